"""Pack lengths into groups of at most a number of tokens; integers only.

capacity 10      lengths 7 6 4 3 3 2        best fit decreasing: 7+3, 6+4, 3+2
"""

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Partition indices into groups whose lengths add up to at most `capacity`.

    The longest come first, each into the fullest group that it fits into (the newest of equally full ones). Uses at
    most 11/9 OPT + 6/9 groups: Dosa, "The tight bound of first fit decreasing ..." (2007), whose bound also holds for
    best fit. Time O(n log n).

    Raises:
        ValueError: a length is above `capacity`, or below 1.
    """
    _check(lengths, capacity)
    groups: list[list[int]] = []
    spaces: list[int] = []  # distinct free spaces, ascending
    with_space: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
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
    """Partition indices into groups of similar length: group size times longest length is at most `capacity`.

    This is a token budget for padded batches, where each row is as wide as the longest.
    """
    _check(lengths, capacity)
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= capacity:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _check(lengths: Sequence[int], capacity: int) -> None:
    if len(lengths) and not 1 <= min(lengths) <= max(lengths) <= capacity:
        raise ValueError(f"lengths from {min(lengths)} to {max(lengths)} do not fit a capacity of {capacity}")
