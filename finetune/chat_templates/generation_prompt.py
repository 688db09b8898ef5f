"""Serving as training did: what stands before an answer, what an answer says, which tokens end it.

turns       human "Hi"
prompt      <s>  Hi  </s>  <m>              in training, behind these ids:   Yes  </s>
the model says                Yes  </s>     the answer is the text that training renders to this:  "Yes"
"""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix

from finetune.chat_templates.example import ChatFormat, TokenizedConversation, UnrenderableError, tokenize_conversation
from finetune.chat_templates.plain_text import PlainTextTokenizer
from finetune.chat_templates.supervision_rules import REASONING_END
from finetune.conversation import Turn

# Answers that no template changes, of several kinds of letters: what a tokenizer joins with a space differs.
ANSWERS = ("a", "好", "1", "-", "🙂")
REASONING = f"<think>\na\n{REASONING_END}\n\n"
BROKEN = "\ufffd"  # what bytes decode to that are no whole character
MOST_HELD = 64  # tokens; no character has as many


def prompt_ids(chat_format: ChatFormat, turns: Sequence[Turn], *, reasons: bool = False) -> list[int]:
    """The ids before the answer to `turns`, which end with a human turn: to the last one those of the training.

    Where a template ends in white space that a tokenizer may join with the answer's first letter (`ASSISTANT: Yes`),
    the prompt ends before it: whether that space is a token of its own is part of what the model says.

    Args:
        reasons: the answer begins with its reasoning; templates may write something else before such a one.

    Raises:
        Unrenderable: the format cannot express the turns, or what stands before an answer depends on it.
    """
    probes = [Turn("model", (REASONING if reasons else "") + answer) for answer in ANSWERS]
    layouts = chat_format.tokenize_all([[*turns, probe] for probe in probes])
    before = [
        layout.input_ids[: layout.answers[-1].start] for layout in layouts if isinstance(layout, TokenizedConversation)
    ]
    if not before:
        raise next(layout for layout in layouts if isinstance(layout, UnrenderableError))
    shared = list(commonprefix(before))
    for ids in before:
        rest = ids[len(shared) :]
        if not chat_format.plain.control_ids.isdisjoint(rest) or chat_format.plain.decode_all([rest])[0].strip():
            raise UnrenderableError("what the chat template writes before an answer depends on the answer")
    return shared


def depends_on_reasoning(chat_format: ChatFormat) -> bool:
    """Whether the format writes something else before an answer that begins with its reasoning."""
    turns = [Turn("human", "a")]
    try:
        return prompt_ids(chat_format, turns) != prompt_ids(chat_format, turns, reasons=True)
    except UnrenderableError:
        return False


def end_token_ids(chat_format: ChatFormat) -> list[int]:
    """The tokens that end model turns in this format, the last turn's first."""
    pair = [Turn("human", "a"), Turn("model", "b")]
    layouts = chat_format.tokenize_all([pair, [*pair, *pair]])
    ends = [
        layout.labels[answer.stop - 1]
        for layout in layouts
        if isinstance(layout, TokenizedConversation)
        for answer in reversed(layout.answers)
    ]
    return list(dict.fromkeys(ends))


def answer_text(chat_format: ChatFormat, turns: Sequence[Turn], prompt: Sequence[int], said: Sequence[int]) -> str:
    """The text that `said`, the ids behind `prompt` up to the end of the turn, has in training; "" for none.

    White space at its ends belongs to the text or to the template, as whether training would render the text to what
    was said shows; what training could not have rendered at all is stripped.
    """
    raw = spelled(chat_format.plain, prompt, said)
    begun = (raw, raw.removeprefix(" "), raw.lstrip())
    for text in dict.fromkeys(one for begin in begun for one in (begin, begin.removesuffix("\n"), begin.rstrip())):
        if not text.strip():
            return ""
        try:
            layout = tokenize_conversation(chat_format, [*turns, Turn("model", text)])
        except UnrenderableError:
            continue
        answer = layout.answers[-1]
        ids = layout.input_ids[: answer.stop - 1]
        if ids[: len(prompt)] == list(prompt) and spelled(chat_format.plain, prompt, ids[len(prompt) :]) == raw:
            return text
    return raw.strip()


def spelled(plain: PlainTextTokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` as it stands behind `before`."""
    spelling = AnswerDecoder(plain, before)
    return "".join([*map(spelling.add, ids), spelling.rest()])


class AnswerDecoder:
    """Text out of tokens as they come, no character before it is whole, control tokens left out.

        tokens   <0xF0>  <0x9F>  <0x99>  <0x82>  !
        text     ""      ""      ""      🙂      !

    Only the tokens since the last two whole characters are decoded again. `before` is what stands in front: the first
    tokens of a sentencepiece vocabulary lose their space where nothing does.
    """

    def __init__(self, plain: PlainTextTokenizer, before: Sequence[int] = ()) -> None:
        self.plain = plain
        self._window = [one for one in before[-1:] if self._is_known(one)]
        self._whole = len(self._window)  # tokens of the window whose text has been told to its last letter
        self._told = len(self._text(self._window))  # letters of the window's text that have been told

    def add(self, token: int) -> str:
        """The text that this token completes."""
        if token in self.plain.control_ids or not self._is_known(token):
            return ""
        self._window.append(token)
        text = self._text(self._window)
        whole = text.rstrip(BROKEN)
        if len(self._window) - self._whole > MOST_HELD:
            whole = text
        piece = whole[self._told :]
        self._told = max(self._told, len(whole))
        if whole == text:
            self._window = self._window[self._whole :]
            self._whole = len(self._window)
            self._told = len(self._text(self._window))
        return piece

    def rest(self) -> str:
        """What is left at the end: of characters that were never completed, the sign for that."""
        piece = self._text(self._window)[self._told :]
        self._told += len(piece)
        return piece

    def _text(self, ids: Sequence[int]) -> str:
        return self.plain.decode_all([ids])[0] if ids else ""

    def _is_known(self, token: int) -> bool:
        """Embeddings are often padded: such a row is no token, yet a model may name it."""
        return self.plain.tokenizer.convert_ids_to_tokens(token) is not None
