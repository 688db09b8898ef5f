"""What stands before an answer: the ids behind which training has taught the model to speak."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.conversations import Turn
from finetune.rendering.examples import ChatFormat, Unrenderable, lay_out

# Two answers that no template changes: what stands before them must be the same.
ANSWERS = ("a", "好")


def prompt_ids(chat_format: ChatFormat, turns: Sequence[Turn]) -> list[int]:
    """The ids before the answer to `turns`, which end with a human turn: to the last one those of the training.

        turns       human "Hi"
        input_ids   <s>  Hi  </s>  <m>          and in training, behind them:  Yes  </s>

    Raises:
        Unrenderable: the format cannot express the turns, or what stands before an answer depends on it.
    """
    found = []
    for answer in ANSWERS:
        layout = lay_out(chat_format, [*turns, Turn("model", answer)])
        found.append(layout.input_ids[: layout.answers[-1].start])
    if found[0] != found[1]:
        raise Unrenderable("what the chat template writes before an answer depends on the answer")
    return found[0]
