"""Pack lengths into groups of at most a number of tokens; integers only.

capacity 10      lengths 7 6 4 3 3 2        best fit decreasing: 7+3, 6+4, 3+2
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np

# Lengths in descending order and a capacity -> number of the group of each length, counted from 0, int64 [lengths].
Fill = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Groups:
    """Groups of rows: group g has `rows[starts[g] : starts[g + 1]]`, longest first; both are int64 arrays."""

    rows: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def rows_of(self, groups: np.ndarray) -> np.ndarray:
        """Rows of these groups, one group after the other."""
        sizes = self.starts[groups + 1] - self.starts[groups]
        begins = self.starts[groups] - (np.cumsum(sizes) - sizes)
        return self.rows[np.repeat(begins, sizes) + np.arange(sizes.sum())]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum of a value of each row by group: [groups]."""
        return np.add.reduceat(values[self.rows], self.starts[:-1]) if len(self) else values[:0]

    @classmethod
    def pack(cls, lengths: np.ndarray, capacity: int, fill: Fill, windows: Iterable[np.ndarray]) -> Self:
        """Divide the rows of each window into groups; `lengths` int64 [rows].

        Raises:
            ValueError: a length is above `capacity`, or below 1.
        """
        if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
            raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} do not fit a capacity of {capacity}")
        rows, sizes = [lengths[:0]], [lengths[:0]]
        for window in windows:
            longest_first = window[np.argsort(-lengths[window], kind="stable")]
            group_of = fill(lengths[longest_first], capacity)
            rows.append(longest_first[np.argsort(group_of, kind="stable")])
            sizes.append(np.bincount(group_of))
        return cls(np.concatenate(rows), np.cumsum(np.concatenate([[0], *sizes])))


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Put each length into the fullest group that it fits into (the newest of equally full ones): a `Fill`.

    Uses at most 11/9 OPT + 6/9 groups: Dosa, "The tight bound of first fit decreasing ..." (2007), whose bound also
    holds for best fit. Equal lengths are placed together: a group that takes one of them is then the fullest, so that
    it takes as many as fit. The time depends on the number of distinct lengths, hardly on that of rows.
    """
    # (lengths placed, how many of them share a group, first group, difference to the next group)
    placements: list[tuple[int, int, int, int]] = []
    spaces: list[int] = []  # distinct free spaces, ascending
    with_space: dict[int, list[range]] = {}  # groups with this free space, the newest last

    def put(groups: range, space: int) -> None:
        if space in with_space:
            with_space[space].append(groups)
        elif space:
            with_space[space] = [groups]
            insort(spaces, space)

    placed = num_groups = 0
    distinct, counts = np.unique(-lengths, return_counts=True)
    for length, end in zip((-distinct).tolist(), np.cumsum(counts).tolist(), strict=True):
        while placed < end:
            at = bisect_left(spaces, length)
            space = spaces[at] if at < len(spaces) else capacity
            per_group = space // length
            needed = -(-(end - placed) // per_group)
            if at == len(spaces):
                groups = range(num_groups, num_groups + needed)
                num_groups += needed
            else:
                newest = with_space[space].pop()
                groups = newest[: -needed - 1 : -1]
                if len(groups) < len(newest):
                    with_space[space].append(newest[:-needed])
                elif not with_space[space]:
                    del with_space[space], spaces[at]
            count = min(per_group * len(groups), end - placed)
            placements.append((count, per_group, groups.start, groups.step))
            placed += count
            num_full, in_last = divmod(count, per_group)
            if num_full:
                put(groups[:num_full], space - per_group * length)
            if in_last:
                put(groups[num_full:], space - in_last * length)
    counts, per_group, first, step = np.array(placements, dtype=np.int64).reshape(-1, 4).T
    in_placement = np.arange(len(lengths)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first, counts) + np.repeat(step, counts) * (in_placement // np.repeat(per_group, counts))


def rectangles(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Group similar lengths, so that group size times longest length is at most `capacity`: a `Fill`.

    This is a token budget for padded batches, where each row is as wide as the longest.
    """
    group_of = np.empty(len(lengths), dtype=np.int64)
    begin = group = 0
    while begin < len(lengths):
        end = begin + capacity // int(lengths[begin])
        group_of[begin:end] = group
        begin, group = end, group + 1
    return group_of
