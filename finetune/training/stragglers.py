"""Detect a rank that the others wait for, from the seconds that every rank computes in each step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

STEPS_COMPARED, STEPS_BETWEEN_LOOKS, STEPS_OF_SILENCE = 10, 5, 500
SECONDS_THAT_MATTER, SHARE_THAT_MATTERS = 0.05, 0.2


@dataclass(frozen=True)
class Straggler:
    """A slow rank: its compute seconds per step, those of the others, and the seconds of the whole step."""

    rank: int
    seconds: float
    others: float
    step_seconds: float

    @property
    def cost(self) -> float:
        """Seconds that each step would save."""
        return self.seconds - self.others


def find_straggler(own: Sequence[Sequence[float]], step_seconds: Sequence[float]) -> Straggler | None:
    """Return the slowest rank if it costs 50 ms and a fifth of the step; medians over the steps.

    Args:
        own: [ranks][steps], compute seconds of each rank.
        step_seconds: [steps], of whole steps.
    """
    if len(own) < 2 or not step_seconds:
        return None
    by_rank = [median(seconds) for seconds in own]
    rank = max(range(len(by_rank)), key=by_rank.__getitem__)
    others = median(seconds for other, seconds in enumerate(by_rank) if other != rank)
    straggler = Straggler(rank, by_rank[rank], others, median(step_seconds))
    threshold = max(SECONDS_THAT_MATTER, SHARE_THAT_MATTERS * straggler.step_seconds)
    return straggler if straggler.cost > threshold else None


@dataclass
class Stragglers:
    """Look for a slow rank every few steps; report the same one again only after many steps."""

    steps: deque = field(default_factory=lambda: deque(maxlen=STEPS_COMPARED))
    seen: int = 0
    named: dict[int, int] = field(default_factory=dict)

    def add(self, own: Sequence[float], step_seconds: float) -> Straggler | None:
        """Add the compute seconds of each rank and the seconds of the step; return a rank to report now, or None."""
        self.steps.append((tuple(own), step_seconds))
        self.seen += 1
        if len(self.steps) < STEPS_COMPARED or self.seen % STEPS_BETWEEN_LOOKS:
            return None
        by_rank = list(zip(*(seconds for seconds, _ in self.steps), strict=True))
        straggler = find_straggler(by_rank, [seconds for _, seconds in self.steps])
        if straggler is None or self.seen - self.named.get(straggler.rank, -STEPS_OF_SILENCE) < STEPS_OF_SILENCE:
            return None
        self.named[straggler.rank] = self.seen
        return straggler
