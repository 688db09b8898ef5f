"""A rank that the others wait for: found from the seconds of each step that every rank works on its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

STEPS_COMPARED, STEPS_BETWEEN_LOOKS, STEPS_OF_SILENCE = 10, 5, 500
SECONDS_THAT_MATTER, SHARE_THAT_MATTERS = 0.05, 0.2


@dataclass(frozen=True)
class Straggler:
    """A rank that the others wait for: seconds of its own per step, the others', and those of the whole step."""

    rank: int
    seconds: float
    others: float
    step_seconds: float

    @property
    def cost(self) -> float:
        """Seconds that each step would be shorter by."""
        return self.seconds - self.others


def find_straggler(own: Sequence[Sequence[float]], step_seconds: Sequence[float]) -> Straggler | None:
    """The rank that takes longest, if that costs 50 ms and a fifth of the step; medians over the steps.

    Args:
        own: [ranks][steps], each rank's own working seconds.
        step_seconds: [steps], of whole steps.
    """
    if len(own) < 2 or not step_seconds:
        return None
    by_rank = [median(one) for one in own]
    rank = max(range(len(by_rank)), key=by_rank.__getitem__)
    others = median(one for number, one in enumerate(by_rank) if number != rank)
    found = Straggler(rank, by_rank[rank], others, median(step_seconds))
    return found if found.cost > max(SECONDS_THAT_MATTER, SHARE_THAT_MATTERS * found.step_seconds) else None


@dataclass
class Stragglers:
    """Looks for a slow rank now and then, and names the same one again only after many steps."""

    steps: deque = field(default_factory=lambda: deque(maxlen=STEPS_COMPARED))
    seen: int = 0
    named: dict[int, int] = field(default_factory=dict)

    def add(self, own: Sequence[float], step_seconds: float) -> Straggler | None:
        """One step: each rank's own seconds, and those of the whole; a rank to be named now."""
        self.steps.append((tuple(own), step_seconds))
        self.seen += 1
        if len(self.steps) < STEPS_COMPARED or self.seen % STEPS_BETWEEN_LOOKS:
            return None
        found = find_straggler(list(zip(*(one for one, _ in self.steps), strict=True)), [one for _, one in self.steps])
        if found is None or self.seen - self.named.get(found.rank, -STEPS_OF_SILENCE) < STEPS_OF_SILENCE:
            return None
        self.named[found.rank] = self.seen
        return found
