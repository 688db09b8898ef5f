"""Which values of a matrix the fast tier sees; the slow tier sees the rest."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], fast: Container[Any]) -> list[Any]:
    """Parameters of a test, all of them marked `slow` but for those in `fast`."""
    return [
        value
        if value in fast
        else pytest.param(*value if isinstance(value, tuple) else (value,), marks=pytest.mark.slow)
        for value in values
    ]
