"""Lengths -> groups that fill a number of tokens; integers only.

capacity 10      lengths 7 6 4 3 3 2        best fit decreasing: 7+3, 6+4, 3+2
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Groups of indices whose lengths add up to at most `capacity`; every index is in exactly one of them.

    The longest come first, each into the fullest group that still takes it (of equally full ones the newest). At most
    11/9 of the fewest possible groups and 6/9 more: Dosa, "The tight bound of first fit decreasing ..." (2007), whose
    bound holds for best fit too. Time n log n.

    Raises:
        ValueError: a length is above `capacity`, or below 1.
    """
    _check(lengths, capacity)
    groups: list[list[int]] = []
    spaces: list[int] = []  # the different free spaces, ascending
    with_space: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        length = lengths[index]
        at = bisect_left(spaces, length)
        if at == len(spaces):
            group, left = len(groups), capacity - length
            groups.append([index])
        else:
            space = spaces[at]
            group, left = with_space[space].pop(), space - length
            groups[group].append(index)
            if not with_space[space]:
                del with_space[space], spaces[at]
        if left not in with_space:
            insort(spaces, left)
        with_space.setdefault(left, []).append(group)
    return groups


def rectangles(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Groups of indices of similar length: their number times the longest of them is at most `capacity`.

    What a token budget means for padded batches, where each row takes as much as the longest.

    Raises:
        ValueError: a length is above `capacity`, or below 1.
    """
    _check(lengths, capacity)
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= capacity:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _check(lengths: Sequence[int], capacity: int) -> None:
    if len(lengths) and not 1 <= min(lengths) <= max(lengths) <= capacity:
        raise ValueError(f"lengths from {min(lengths)} to {max(lengths)} do not fit a capacity of {capacity}")
