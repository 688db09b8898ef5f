"""What libraries and systems really say, and the cause that each is an example of."""

from __future__ import annotations

from typing import NamedTuple

from failure_texts.machines import OF_MACHINES
from failure_texts.made import OOM, WATCHDOG, died, said
from failure_texts.software import OF_SOFTWARE
from finetune.diagnostics import Failure

__all__ = ["OOM", "SAMPLES", "WATCHDOG", "Sample", "died", "said"]


class Sample(NamedTuple):
    """The title of a cause, and a failure that has it."""

    title: str
    failure: Failure


SAMPLES = [Sample(title, failure) for title, failures in {**OF_MACHINES, **OF_SOFTWARE}.items() for failure in failures]
