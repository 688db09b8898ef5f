"""Keys of a row or a turn that say how good its answer is: an answer that is not to be imitated must not be supervised.

Only keys of the row and of model turns are read, not those nested in other values (`"metadata": {"score": 1}`). A
string that is no word of `BAD_WORDS`, such as the name of a class, is no verdict.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from finetune.dataset.json_decoder import shown

# False, a number of 0 or below, or a bad word under one of these says that the answer is bad.
GOOD_KEYS = (
    "label", "kto_tag", "kto_label", "chosen", "is_chosen", "preferred", "is_preferred", "accepted", "is_accepted",
    "approved", "desirable", "is_desirable", "good", "is_good", "correct", "is_correct", "valid", "is_valid", "keep",
    "passed", "success", "resolved", "is_safe", "safe", "thumbs_up", "review_result", "feedback", "verdict",
    "judgement", "judgment", "quality", "training", "trainable", "supervised", "train_on_turn", "calculate_loss",
    "compute_loss", "is_trainable", "is_supervised", "supervise", "learn", "completion_mask",
)  # fmt: skip
ROW_WEIGHTS = ("weight", "loss_weight", "sample_weight", "loss_scale")
# These of a row only: in a turn they are flags of the format, or weights.
GOOD_KEYS_OF_ROWS = ("train", *ROW_WEIGHTS)
# True, a number above 0, or a bad word under one of these says so.
BAD_KEYS = (
    "rejected", "is_rejected", "bad", "is_bad", "wrong", "is_wrong", "incorrect", "is_incorrect", "undesirable",
    "is_undesirable", "thumbs_down", "discard", "discarded", "exclude", "excluded", "ignore", "skip", "deleted",
    "toxic", "is_toxic", "harmful", "is_harmful", "unsafe", "is_unsafe",
)  # fmt: skip
# A number grades the answer, and nothing says which numbers are good enough.
GRADES = tuple(
    "score reward rating grade reward_score quality_score overall_score instruct_reward helpfulness correctness".split()
)
VERDICTS_OF_TURNS = frozenset({*GOOD_KEYS, *BAD_KEYS, *GRADES})
VERDICT_KEYS = VERDICTS_OF_TURNS | frozenset(GOOD_KEYS_OF_ROWS)

BAD_WORDS = frozenset(
    "bad poor very_poor wrong incorrect invalid rejected reject undesirable dispreferred unacceptable fail failed "
    "dislike disliked thumbs_down thumbsdown downvote".split()
)
NUMBERS = {"true": 1, "yes": 1, "false": 0, "no": 0}
REMEDY = "leave such rows out, or delete the key where it means something else (or --repairs ignore_verdicts)"


def verdict_faults(holder: Mapping[str, Any], keys: Iterable[str], place: str) -> list[str]:
    """Why the answers of a row, or a model turn, are not to be supervised; `keys` are its keys to look at."""
    return [f"{place}: {verdict}: {REMEDY}" for key in sorted(keys) if (verdict := _verdict(key, holder[key]))]


def is_remark(value: Any) -> bool:
    """Whether a value under a key of a verdict is none, and not empty: it is not read then."""
    return value not in ("", [], {}) and _number(value) is None and not _is_bad_word(value)


def _is_bad_word(value: Any) -> bool:
    return isinstance(value, str) and re.sub(r"[\s-]+", "_", value.strip().casefold()) in BAD_WORDS


def _verdict(key: str, value: Any) -> str | None:
    number = _number(value)
    if key in GRADES and number is not None and not isinstance(value, bool):
        return f'"{key}" grades the answer, and no grade is known to be good enough'
    if number is not None:
        is_bad = number > 0 if key in BAD_KEYS else number <= 0
    else:
        is_bad = _is_bad_word(value)
    return f'"{key}": {shown(value)} says that the answer is not to be imitated' if is_bad else None


def _number(value: Any) -> float | None:
    try:
        return float(NUMBERS.get(value.strip().casefold(), value) if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError):
        return None
