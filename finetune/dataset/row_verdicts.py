"""Keys of a row or a turn that say how good its answer is: an answer that is not to be imitated must not be supervised.

Only keys of the row and of model turns are read, not those nested in other values (`"metadata": {"score": 1}`). A
string that is no word of `BAD_WORDS`, such as the name of a class, is no verdict.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from finetune.dataset.json_decoder import shown


def _spellings(words: str) -> tuple[str, ...]:
    """The keys that mean these words: `correct`, `is_correct`, `isCorrect`; `finish_reason`, `finishReason`."""
    keys = [key for word in words.split() for key in (word, f"is_{word}")]
    return tuple(dict.fromkeys([*keys, *(re.sub(r"_(\w)", lambda part: part[1].upper(), key) for key in keys)]))


# Why a generation ended: an answer that was cut off, or is an error, is bad. Other values are remarks.
REASONS = _spellings("finish_reason stop_reason done_reason status outcome")
CUT_OFF = frozenset(
    "length max_length max_tokens max_output_tokens model_length model_context_window_exceeded incomplete truncated "
    "content_filter safety error cancelled".split()
)
# False, a number of 0 or below, or a bad word under one of these says that the answer is bad.
GOOD_KEYS = _spellings(
    "label kto_tag kto_label chosen preferred accepted approved desirable good correct valid keep passed success "
    "resolved safe thumbs_up review_result feedback verdict judgement judgment training trainable supervised "
    "train_on_turn calculate_loss compute_loss supervise learn completion_mask complete completed finished "
    "use_for_training"
)
ROW_WEIGHTS = ("weight", "loss_weight", "sample_weight", "loss_scale")
# These of a row only: in a turn they are flags of the format, or weights.
GOOD_KEYS_OF_ROWS = ("train", "loss", *ROW_WEIGHTS)
# True, a number above 0, or a bad word under one of these says so.
BAD_KEYS = _spellings(
    "rejected bad wrong incorrect undesirable thumbs_down discard discarded exclude excluded ignore skip deleted toxic "
    "harmful unsafe truncated incomplete flagged spam nsfw blocked invalid exclude_from_training ignore_loss"
)
# A number grades the answer, and nothing says which numbers are good enough.
GRADES = tuple(
    "score reward rating grade quality reward_score quality_score overall_score instruct_reward helpfulness "
    "correctness".split()
)
VERDICTS_OF_TURNS = frozenset({*REASONS, *GOOD_KEYS, *BAD_KEYS, *GRADES})
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


def is_remark(key: str, value: Any) -> bool:
    """Whether a value under a key of a verdict is none, and not empty: it is not read then."""
    number = _number(value)
    is_number = number is not None and key not in REASONS and (key != "loss" or number in (0, 1))
    return value not in ("", [], {}) and not is_number and not _is_bad_word(key, value)


def _is_bad_word(key: str, value: Any) -> bool:
    word = re.sub(r"[\s-]+", "_", value.strip().casefold()) if isinstance(value, str) else ""
    return word in BAD_WORDS or (key in REASONS and word in CUT_OFF)


def _verdict(key: str, value: Any) -> str | None:
    number = None if key in REASONS else _number(value)
    if key in GRADES and number is not None and not isinstance(value, bool):
        return f'"{key}" grades the answer, and no grade is known to be good enough'
    is_bad = _is_bad_word(key, value) if number is None else number > 0 if key in BAD_KEYS else number <= 0
    how = "was cut off, or is not" if key in REASONS else "is not"
    return f'"{key}": {shown(value)} says that the answer {how} to be imitated' if is_bad else None


def _number(value: Any) -> float | None:
    try:
        return float(NUMBERS.get(value.strip().casefold(), value) if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError):
        return None
