"""Conversation -> `Example`: the ids a model sees, and at each position what it should have predicted there.

Supervision comes from structure. A chat format lays a conversation out as pieces, each known to be context or part of
a turn; nothing is searched for afterwards. What is learned is a model turn's text and the token that ends the turn.
Contents are encoded as plain text: where a turn spells a control token (`</s>`, `<|im_end|>`), it gets the ids of
those characters and can neither end a turn nor open one.

    turn              human            model
    text              Hi               Yes
    input_ids    <s>  Hi   </s>   <m>  Yes  </s>
    labels       -100 -100 -100   -100 Yes  </s>
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from finetune.conversations import Conversation, Turn
from finetune.errors import ConfigError, DataError

IGNORE_INDEX = -100
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKERS = ("<|im_start|>", "<|im_end|>")
TEMPLATE_ROLES = {"human": "user", "model": "assistant", "system": "system"}
SYSTEM_SEPARATOR = "\n\n"

Status = Literal["kept", "cut", "split", "dropped"]


@dataclass(frozen=True)
class TurnSpan:
    """Where a turn lies in an example: tokens `start` to `stop` (exclusive), its end-of-turn token included."""

    turn: int
    role: str
    start: int
    stop: int


@dataclass(frozen=True)
class Example:
    """One training sequence.

    `input_ids` and `labels` are lists of the same length; `labels[i]` is -100 or what position i should have been
    predicted as (position i-1 predicts it; position 0 is predicted by nothing and always -100). `row` and `source`
    say which conversation it is, `window` which part of it.
    """

    input_ids: list[int]
    labels: list[int]
    row: int
    source: str
    window: int = 0
    turn_spans: tuple[TurnSpan, ...] = ()

    @property
    def num_supervised(self) -> int:
        """Positions that are learned."""
        return sum(label != IGNORE_INDEX for label in self.labels)


@dataclass(frozen=True)
class Rendering:
    """What became of one conversation: its examples (none when dropped) and, unless all is plain, the reason."""

    row: int
    id: Any
    status: Status
    examples: tuple[Example, ...]
    reason: str | None = None


@dataclass
class Layout:
    """A conversation laid out as tokens; grows piece by piece."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    spans: list[TurnSpan] = field(default_factory=list)

    def add(self, ids: Sequence[int], *, learned: bool) -> None:
        """Append ids, all of them learned or all of them context."""
        self.input_ids += ids
        self.labels += ids if learned else [IGNORE_INDEX] * len(ids)


class ChatFormat(Protocol):
    """How turns become tokens."""

    name: str
    rule: str | None

    def lay_out(self, turns: Sequence[Turn]) -> Layout:
        """Lay the turns out; raises `Unrenderable` where the format cannot express them."""
        ...


class Unrenderable(Exception):
    """The format cannot express this conversation; the message is the reason alone."""


class PlainText:
    """Encodes text so that no substring of it becomes a control token.

    A tokenizer with a Rust backend is copied without its added tokens; a Python-backed one is asked to split them.
    Either way the result is checked: an added token among the ids raises `Unrenderable`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.added_ids = frozenset(tokenizer.added_tokens_decoder) | frozenset(tokenizer.all_special_ids)
        self.added_texts = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip())

    @cached_property
    def _backend(self) -> Any:
        from tokenizers import Tokenizer

        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        state.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        return Tokenizer.from_str(json.dumps(state))

    def spells_control_token(self, text: str) -> bool:
        """Whether the text holds the spelling of an added token."""
        return any(token in text for token in self.added_texts)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; decoding them gives the text back, control spellings included."""
        if self.tokenizer.is_fast:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        else:
            ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        smuggled = self.added_ids.intersection(ids) - {self.tokenizer.unk_token_id}
        if smuggled and self.spells_control_token(text):
            raise Unrenderable(
                "a turn spells the control token "
                f"{self.tokenizer.convert_ids_to_tokens(min(smuggled))!r} and this tokenizer cannot encode it as text"
            )
        return list(ids)


class LingoWhaleFormat:
    """The format published with LingoWhale-8B: a marker before each turn, an end token learned after each model turn.

        input_ids   <human> Hi   <model> Yes  <human> Bye  <model> Ok   </s>
        labels      -100    -100 -100    Yes  </s>    -100 -100    Ok   </s>

    After a model turn's last token the model learns to stop: the label at the next human marker is the end token,
    although the id seen there is the marker. The last turn is closed by a real end token. A system turn has no marker
    of its own and is put in front of the first human turn.
    """

    name = "lingowhale"

    def __init__(self, tokenizer: Any, human_token_ids: Sequence[int], model_token_ids: Sequence[int]) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "--chat_template lingowhale: the tokenizer has no end-of-sequence token to end a turn with"
            )
        self.plain = PlainText(tokenizer)
        self.end = tokenizer.eos_token_id
        self.markers = {"human": list(human_token_ids), "model": list(model_token_ids)}
        self.rule: str | None = None

    def lay_out(self, turns: Sequence[Turn]) -> Layout:
        """See the drawing above."""
        layout = Layout()
        skipped = 0
        self.rule = None
        if turns[0].role == "system":
            system, first, *others = turns
            if first.role != "human":
                raise Unrenderable("this format puts a system turn in front of the first human turn, and there is none")
            turns = [Turn("human", system.text + SYSTEM_SEPARATOR + first.text), *others]
            skipped = 1
            self.rule = "system turn put in front of the first human turn"
        for number, turn in enumerate(turns):
            start = len(layout.input_ids)
            layout.add(self.markers[turn.role], learned=False)
            if number and turns[number - 1].role == "model":
                layout.labels[start] = self.end
            layout.add(self.plain.encode(turn.text), learned=turn.role == "model")
            layout.spans.append(TurnSpan(number + skipped, turn.role, start, len(layout.input_ids)))
        layout.add([self.end], learned=turns[-1].role == "model")
        return layout


class TemplateFormat:
    """A Jinja chat template, the tokenizer's own or another.

    The conversation is rendered twice, once with a placeholder for each content: the text between the placeholders is
    the template's, and the second rendering must be that text around the real contents (or their stripped forms).
    One tokenization of the whole with offsets then gives exactly the ids of `apply_chat_template`. A content that
    spells an added token is instead encoded on its own, as plain text, between the template's encoded pieces.
    """

    def __init__(self, tokenizer: Any, template: str, name: str) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.name = name
        self.rule: str | None = None
        self.plain = PlainText(tokenizer)

    def lay_out(self, turns: Sequence[Turn]) -> Layout:
        """Tokens of the rendered conversation, its model turns and their end tokens learned."""
        pieces = self._template_pieces(turns)
        text = self._render([turn.text for turn in turns], turns)
        contents = _match_contents(text, pieces, turns)
        if self.tokenizer.is_fast and not any(self.plain.spells_control_token(content) for content in contents):
            return self._by_offsets(turns, pieces, contents, text)
        return self._piece_by_piece(turns, pieces, contents, text)

    def _render(self, contents: Sequence[str], turns: Sequence[Turn]) -> str:
        from jinja2 import TemplateError

        messages = [
            {"role": TEMPLATE_ROLES[turn.role], "content": content}
            for turn, content in zip(turns, contents, strict=True)
        ]
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=self.template)
        except TemplateError as error:
            raise Unrenderable(f"the chat template refuses it: {error}") from None

    def _template_pieces(self, turns: Sequence[Turn]) -> list[str]:
        """The template's own text before, between and after the contents: one piece more than turns."""
        said = "".join(turn.text for turn in turns)
        fence = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in said)
        placeholders = [f"{fence}{number}{fence}" for number in range(len(turns))]
        rest, pieces = self._render(placeholders, turns), []
        for number, placeholder in enumerate(placeholders):
            before, found, rest = rest.partition(placeholder)
            if not found or placeholder in rest:
                raise Unrenderable(f"the chat template leaves out, repeats or reorders turn {number}")
            pieces.append(before)
        return [*pieces, rest]

    def _by_offsets(self, turns: Sequence[Turn], pieces: list[str], contents: list[str], text: str) -> Layout:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        layout = Layout(ids, [IGNORE_INDEX] * len(ids))
        at, token = 0, 0
        for number, turn in enumerate(turns):
            begin = at + len(pieces[number])
            at = begin + len(contents[number])
            while token < len(ids) and offsets[token][1] <= begin:
                token += 1
            start = token
            while token < len(ids) and offsets[token][0] < at:
                token += 1
            if turn.role == "model":
                token = self._end_of_turn(ids, token, number) + 1
                layout.labels[start:token] = ids[start:token]
            layout.spans.append(TurnSpan(number, turn.role, start, token))
        return layout

    def _piece_by_piece(self, turns: Sequence[Turn], pieces: list[str], contents: list[str], text: str) -> Layout:
        layout, waiting = Layout(), None
        for number, turn in enumerate(turns):
            self._add_piece(layout, pieces[number], waiting)
            start = len(layout.input_ids)
            layout.add(self.plain.encode(contents[number]), learned=turn.role == "model")
            layout.spans.append(TurnSpan(number, turn.role, start, len(layout.input_ids)))
            waiting = number if turn.role == "model" else None
        self._add_piece(layout, pieces[-1], waiting)
        if not self.tokenizer.is_fast and not any(self.plain.spells_control_token(content) for content in contents):
            whole = self.tokenizer.encode(text, add_special_tokens=False)
            if list(whole) != layout.input_ids:
                raise Unrenderable(
                    "this tokenizer has no offsets and gives other tokens for the whole conversation than for its parts"
                )
        return layout

    def _add_piece(self, layout: Layout, piece: str, after_model_turn: int | None) -> None:
        ids = self.tokenizer.encode(piece, add_special_tokens=False) if piece else []
        begin = len(layout.input_ids)
        layout.add(ids, learned=False)
        if after_model_turn is not None:
            end = self._end_of_turn(layout.input_ids, begin, after_model_turn)
            layout.labels[begin : end + 1] = layout.input_ids[begin : end + 1]
            last = layout.spans[-1]
            layout.spans[-1] = TurnSpan(last.turn, last.role, last.start, end + 1)

    def _end_of_turn(self, ids: Sequence[int], after: int, turn: int) -> int:
        """The position of the token that ends the model turn whose text stops before position `after`.

        It is the first added token from there on; only white space may lie between.
        """
        for position in range(after, len(ids)):
            if ids[position] in self.plain.added_ids:
                return position
            if self.tokenizer.decode([ids[position]]).strip():
                break
        raise Unrenderable(
            f"the chat template ends turn {turn} with no control token, so stopping could not be learned"
        )


def _match_contents(text: str, pieces: list[str], turns: Sequence[Turn]) -> list[str]:
    """Each turn's content as it stands in the rendered text: as given, or stripped at one or both ends."""
    contents, at = [], 0
    for number, turn in enumerate(turns):
        at += len(pieces[number])
        after = pieces[number + 1]
        for content in (turn.text, turn.text.strip(), turn.text.lstrip(), turn.text.rstrip()):
            if text.startswith(content + after, at):
                contents.append(content)
                at += len(content)
                break
        else:
            raise Unrenderable(f"the chat template rewrites what turn {number} says")
    if not text.startswith(pieces[0]) or text != "".join(_interleaved(pieces, contents)):
        raise Unrenderable("the chat template writes other text around these contents than around plain ones")
    return contents


def _interleaved(pieces: list[str], contents: list[str]) -> list[str]:
    return [part for pair in zip(pieces, [*contents, ""], strict=True) for part in pair]


class Renderer:
    """Renders conversations in one format, at most `max_length` tokens each.

    A conversation that is too long keeps as many complete leading turns as fit, ending with a model turn. The only
    cut inside a turn is the first model turn's, at its end, when it does not fit after its context; its end token is
    then not learned. Context that alone fills the limit drops the row.
    """

    def __init__(self, chat_format: ChatFormat, max_length: int) -> None:
        self.format = chat_format
        self.max_length = max_length

    def render(self, conversation: Conversation) -> Rendering:
        """Render one conversation.

        Raises:
            DataError: the format cannot express it; file, row and reason.
        """
        turns = conversation.turns
        try:
            layout = self.format.lay_out(turns)
            rule = self.format.rule
            fitting = self._fitted(layout)
            if fitting is not None:
                return self._rendering(conversation, "kept", fitting, rule)
            return self._shortened(conversation, layout)
        except Unrenderable as refusal:
            raise DataError(f"{conversation.source}, row {conversation.row}: {refusal}") from None

    def _fitted(self, layout: Layout) -> Layout | None:
        """The layout when all that is learned fits; a template's tail behind it (a newline, say) may be left out."""
        last_learned = max((at for at, label in enumerate(layout.labels) if label != IGNORE_INDEX), default=0)
        return _cut(layout, self.max_length) if last_learned < self.max_length else None

    def _shortened(self, conversation: Conversation, layout: Layout) -> Rendering:
        turns, total = conversation.turns, len(layout.input_ids)
        model_turns = [number for number, turn in enumerate(turns) if turn.role == "model"]
        for last in reversed(model_turns[:-1]):
            shorter = self._fitted(self.format.lay_out(turns[: last + 1]))
            if shorter is not None:
                reason = f"{total:,} tokens: the first {last + 1} of {len(turns)} turns are kept"
                return self._rendering(conversation, "cut", shorter, reason)
        first = self.format.lay_out(turns[: model_turns[0] + 1])
        learned = sum(label != IGNORE_INDEX for label in first.labels)
        cut = _cut(first, self.max_length)
        kept = sum(label != IGNORE_INDEX for label in cut.labels)
        if not kept:
            reason = f"{total:,} tokens: the context before the first model turn alone fills {self.max_length:,}"
            return Rendering(conversation.row, conversation.id, "dropped", (), reason)
        reason = f"{total:,} tokens: the first model turn keeps {kept:,} of {learned:,} learned tokens, no end of turn"
        return self._rendering(conversation, "cut", cut, reason)

    def _rendering(self, conversation: Conversation, status: Status, layout: Layout, reason: str | None) -> Rendering:
        labels = [IGNORE_INDEX, *layout.labels[1:]]
        example = Example(
            layout.input_ids, labels, conversation.row, conversation.source, turn_spans=tuple(layout.spans)
        )
        if not example.num_supervised:
            raise Unrenderable("nothing in it would be learned")
        return Rendering(conversation.row, conversation.id, status, (example,), reason)


def _cut(layout: Layout, length: int) -> Layout:
    spans = [
        TurnSpan(span.turn, span.role, span.start, min(span.stop, length))
        for span in layout.spans
        if span.start < length
    ]
    return Layout(layout.input_ids[:length], layout.labels[:length], spans)


def choose_format(
    tokenizer: Any,
    chat_template: str | None = None,
    *,
    human_token_ids: Sequence[int],
    model_token_ids: Sequence[int],
    is_lingowhale: bool = False,
) -> tuple[ChatFormat, list[str]]:
    """The chat format of a run and the lines that announce a choice the user did not make.

    Without `chat_template` (`lingowhale`, `chatml` or a Jinja file): the tokenizer's own template, else LingoWhale's
    format for LingoWhale, else ChatML, whose markers are added to a tokenizer that lacks them.

    Raises:
        ConfigError: a template file that does not exist.
    """
    if chat_template is None and tokenizer.chat_template is None:
        chat_template = "lingowhale" if is_lingowhale else "chatml"
        notes = [f"the tokenizer has no chat template: conversations are rendered in the {chat_template} format"]
    else:
        notes = []
    if chat_template == "lingowhale":
        return LingoWhaleFormat(tokenizer, human_token_ids, model_token_ids), notes
    if chat_template == "chatml":
        missing = [marker for marker in CHATML_MARKERS if marker not in tokenizer.get_vocab()]
        if missing:
            add_control_tokens(tokenizer, missing)
            notes.append(f"chatml: {' and '.join(missing)} are new to this tokenizer and are added to its vocabulary")
        tokenizer.chat_template = CHATML
    elif chat_template is not None:
        tokenizer.chat_template = _template_file(chat_template)
    # A result is saved with this tokenizer, so what serves it renders as training did.
    name = chat_template or "the tokenizer's own chat template"
    return TemplateFormat(tokenizer, tokenizer.get_chat_template(), name), notes


def _template_file(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--chat_template {name}: expected lingowhale, chatml or a Jinja file that can be read: {error}"
        ) from None


def add_control_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Add tokens that no text is ever split into; their ids lie beyond all others.

    Raises:
        ConfigError: the tokenizer's ids have gaps, so that a new token would get an id that is taken.
    """
    taken = {number: token for token, number in tokenizer.get_vocab().items()}
    tokenizer.add_tokens([token for token in tokens if token not in taken.values()], special_tokens=True)
    for token in tokens:
        number = tokenizer.convert_tokens_to_ids(token)
        if taken.get(number, token) != token:
            raise ConfigError(
                f"the token {token!r} cannot be added: this tokenizer gives it the id of {taken[number]!r}"
            )


def stop_token_id(chat_format: ChatFormat) -> int | None:
    """The token that ends a model turn in this format, as training teaches it."""
    probe = chat_format.lay_out([Turn("human", "a"), Turn("model", "b")])
    return next((label for label in reversed(probe.labels) if label != IGNORE_INDEX), None)
