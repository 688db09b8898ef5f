"""The label that the loss ignores, and the error of a conversation that cannot be rendered."""

from __future__ import annotations

IGNORE_INDEX = -100


class UnrenderableError(Exception):
    """The format cannot express this conversation; the message is the reason alone."""
