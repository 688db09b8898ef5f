"""Generation prompts with exactly the token ids used in training, stop tokens, and decoding of answers.

turns       human "Hi"
prompt      <s>  Hi  </s>  <m>              in training, these ids are followed by:   Yes  </s>
generated                     Yes  </s>     the answer is the text that training renders to these ids:  "Yes"
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from os.path import commonprefix

from finetune.chat_templates.example import ChatFormat, TokenizedConversation, UnrenderableError, tokenize_conversation
from finetune.chat_templates.messages import sample_tool
from finetune.chat_templates.plain_text import PlainTextTokenizer
from finetune.conversation import Conversation, ToolCall, Turn, trained_on

# Answers that no template changes, of several scripts: tokenizers differ in what they join with a space.
PROBES = ("a", "好", "1", "-", "🙂")
REPLACEMENT = "\ufffd"  # what the bytes of an incomplete character decode to
MAX_PENDING = 64  # tokens; no character has as many
TEXT, REASONING = "textq1x", "reasonq1x"  # contents of an answer that shows what the template writes around them
_CALLED = (Turn("human", "a"), Turn("model", "", tool_calls=(ToolCall("f", {"x": "b"}),)))
_CALL = Conversation(_CALLED, tools=(sample_tool("f", "x", "d"),))


def with_answer(conversation: Conversation, answer: Turn) -> Conversation:
    """The conversation with one more model turn, the only supervised one."""
    return replace(conversation, turns=(*trained_on(conversation.turns, ()), answer))


def prompt_ids(chat_format: ChatFormat, conversation: Conversation) -> list[int]:
    """The ids before the answer to a conversation that ends with a human turn or a result: exactly those of training.

    They are those of `apply_chat_template(..., add_generation_prompt=True)`. If a template ends in white space that a
    tokenizer may join with the first letter of the answer (`ASSISTANT: Yes`), they end before it: the model generates
    that space.

    Raises:
        UnrenderableError: the format cannot express the turns, or the text before an answer depends on the answer.
    """
    results = chat_format.tokenize_all([with_answer(conversation, Turn("model", text)) for text in PROBES])
    prefixes = [
        result.input_ids[: result.supervised_spans[-1].start]
        for result in results
        if isinstance(result, TokenizedConversation)
    ]
    if not prefixes:
        raise next(result for result in results if isinstance(result, UnrenderableError))
    shared = list(commonprefix(prefixes))
    for ids in prefixes:
        rest = ids[len(shared) :]
        if not chat_format.plain.control_ids.isdisjoint(rest) or chat_format.plain.decode_all([rest])[0].strip():
            raise UnrenderableError("what the chat template writes before an answer depends on the answer")
    return shared


def end_token_ids(chat_format: ChatFormat) -> list[int]:
    """The tokens that end model turns in this format, that of the last turn first; those of tool calls, too."""
    pair = (Turn("human", "a"), Turn("model", "b"))
    samples = (Conversation(pair), Conversation((*pair, *pair)), _CALL)
    parts = [part for sample in samples for part in chat_format.split_history(sample)]
    ends = [
        result.labels[span.stop - 1]
        for result in chat_format.tokenize_all(parts)
        if isinstance(result, TokenizedConversation)
        for span in reversed(result.supervised_spans)
    ]
    return list(dict.fromkeys(ends))


def answer_ids(
    chat_format: ChatFormat, conversation: Conversation, prompt: Sequence[int], answer: Turn
) -> list[int] | None:
    """The ids after `prompt` that training renders for an answer; None if the format cannot write it behind them."""
    try:
        tokenized = tokenize_conversation(chat_format, with_answer(conversation, answer))
    except UnrenderableError:
        return None
    ids = tokenized.input_ids[: tokenized.supervised_spans[-1].stop]
    return ids[len(prompt) :] if ids[: len(prompt)] == list(prompt) else None


def answer_text(
    chat_format: ChatFormat, conversation: Conversation, prompt: Sequence[int], answer: Sequence[int]
) -> str:
    """The text of `answer`, the generated ids after `prompt` without the end of the turn; "" if it is blank.

    What the template writes in front of an answer is no part of it. White space at the ends belongs to the text or to
    the template: the text is the one that training would render to the generated text. It is stripped if there is none.
    """
    generated = decode_after(chat_format.plain, prompt, answer)
    sample = answer_ids(chat_format, conversation, prompt, Turn("model", TEXT))
    opening = decode_after(chat_format.plain, prompt, sample or ()).partition(TEXT)[0]
    starts = [generated.removeprefix(opening)] if opening.strip() and generated.startswith(opening) else []
    for text in dict.fromkeys(_candidates([*starts, generated])):
        if not text.strip():
            return ""
        ids = answer_ids(chat_format, conversation, prompt, Turn("model", text))
        if ids is not None and decode_after(chat_format.plain, prompt, ids) == generated:
            return text
    return generated.strip()


def _candidates(starts: Sequence[str]) -> Iterator[str]:
    for start in starts:
        for text in (start, start.removeprefix("\n\n"), start.removeprefix(" "), start.lstrip()):
            yield from (text, text.removesuffix("\n"), text.rstrip())


def decode_after(plain: PlainTextTokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` that follow `before`."""
    decoder = AnswerDecoder(plain, before)
    return "".join([*map(decoder.add, ids), decoder.rest()])


class AnswerDecoder:
    """Decodes tokens as they are generated, in complete characters and without control tokens.

        tokens   <0xF0>  <0x9F>  <0x99>  <0x82>  !
        text     ""      ""      ""      🙂      !

    Only the tokens since the last two complete characters are decoded again. `before` are the ids in front: the first
    token of a sentencepiece text would lose its space without them.
    """

    def __init__(self, plain: PlainTextTokenizer, before: Sequence[int] = ()) -> None:
        self.plain = plain = plain.for_answers
        self._window = [token_id for token_id in before[-1:] if self._is_known(token_id)]
        self._num_complete = len(self._window)  # tokens of the window whose text has been returned completely
        self._num_returned = len(self._text(self._window))  # letters of the window's text that have been returned

    def add(self, token: int) -> str:
        """The text that this token completes."""
        if token in self.plain.control_ids or not self._is_known(token):
            return ""
        self._window.append(token)
        text = self._text(self._window)
        complete = text.rstrip(REPLACEMENT)
        if len(self._window) - self._num_complete > MAX_PENDING:
            complete = text
        piece = complete[self._num_returned :]
        self._num_returned = max(self._num_returned, len(complete))
        if complete == text:
            self._window = self._window[self._num_complete :]
            self._num_complete = len(self._window)
            self._num_returned = len(self._text(self._window))
        return piece

    def rest(self) -> str:
        """The rest of the text; U+FFFD for characters that were never completed."""
        piece = self._text(self._window)[self._num_returned :]
        self._num_returned += len(piece)
        return piece

    def _text(self, ids: Sequence[int]) -> str:
        return self.plain.decode_all([ids])[0] if ids else ""

    def _is_known(self, token: int) -> bool:
        """Whether the id is a token: embeddings are often padded, and a model may generate such a row."""
        return self.plain.tokenizer.convert_ids_to_tokens(token) is not None
