"""Chat templates in Jinja, the tokenizer's own or another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from jinja2 import TemplateError

from finetune.chat_templates.example import (
    IGNORE_INDEX,
    STRIPPED_RULE,
    SupervisedSpan,
    TokenizedConversation,
    TurnSpan,
    UnrenderableError,
    system_in_front,
)
from finetune.chat_templates.plain_text import PlainTextTokenizer, with_plain_offsets
from finetune.chat_templates.template_limits import apply_template
from finetune.chat_templates.template_skeleton import (
    ConversationShape,
    TemplateSkeleton,
    build_skeleton,
    find_contents,
    shape_of,
    with_date,
)
from finetune.conversation import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SKELETONS = 4096  # conversations of very many shapes must not fill the memory
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
TEMPLATE_ROLES = {"human": "user", "model": "assistant", "system": "system"}

Result = TypeVar("Result")


@dataclass(eq=False, slots=True)
class _EncodedSkeleton:
    """A skeleton with the ids of its pieces, if these alone can locate each content among the ids."""

    skeleton: TemplateSkeleton
    anchors: list[list[int]] | None
    rules: list[str]
    is_verified: bool = False  # the ids of one conversation are those of `apply_chat_template`


@dataclass(slots=True)
class _Rendered:
    """One conversation as text, with its `contents` in the skeleton's order."""

    turns: Sequence[Turn]
    encoded: _EncodedSkeleton
    text: str
    contents: list[str]
    spelled: int

    @property
    def rules(self) -> list[str]:
        """The rules by which the template changes this conversation."""
        whole = [index for index, number in enumerate(self.skeleton.order) if number not in self.skeleton.tails]
        strips = any(self.turn(at).is_supervised and self.contents[at] != self.turn(at).text for at in whole)
        return [*self.encoded.rules, STRIPPED_RULE] if strips else self.encoded.rules

    @property
    def skeleton(self) -> TemplateSkeleton:
        return self.encoded.skeleton

    def with_ids(self, ids: list[int]) -> TokenizedConversation:
        """The tokenized conversation with these ids, none of them supervised yet."""
        labels = [IGNORE_INDEX] * len(ids)
        return TokenizedConversation(ids, labels, rules=self.rules, spelled=self.spelled)

    def number_of(self, index: int) -> int:
        """The number in the row of the turn with the content `index`."""
        return self.skeleton.order[index] + self.skeleton.system_in_front

    def turn(self, index: int) -> Turn:
        """The turn with the content `index`."""
        return self.turns[self.skeleton.order[index]]

    def add_turn(self, tokenized: TokenizedConversation, index: int, start: int, stop: int) -> None:
        """Set the labels and spans of the turn with the content `index`, whose tokens are `start` to `stop`."""
        turn, number = self.turn(index), self.number_of(index)
        if turn.is_supervised:
            tokenized.labels[start:stop] = tokenized.input_ids[start:stop]
            tokenized.supervised_spans.append(SupervisedSpan(number, start, stop, self.contents[index]))
        tokenized.turn_spans.append(TurnSpan(number, turn.role, start, stop))


class JinjaFormat:
    """A Jinja chat template, the tokenizer's own or another.

    Each conversation is rendered once and must consist of the pieces of its skeleton around its contents (see
    `template_skeleton`). One tokenization of the whole then gives exactly the ids of `apply_chat_template`, and its
    offsets tell which tokens belong to a model turn. A conversation that spells an added token is instead encoded piece
    by piece, its contents as plain text; so is any other if the tokenizer has no offsets where they are needed, and its
    pieces must then give the ids of the whole. A date that it writes is `day`, by default today in UTC.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        name: str,
        content_tokens: Sequence[str] = (),
        day: date | None = None,
    ) -> None:
        self.day = (day or datetime.now(UTC).date()) if "strftime_now" in template else None
        self.template = with_date(template, self.day) if self.day else template
        self.tokenizer, self.name = tokenizer, name
        self.plain = PlainTextTokenizer(tokenizer, content_tokens)
        self._skeletons: dict[ConversationShape, _EncodedSkeleton | UnrenderableError] = {}
        self._encoded_pieces: dict[str, list[int]] = {}
        self._openers: dict[str, int | None] = {}
        self._blank: dict[int, bool] = {}

    def tokenize_all(self, rows: Sequence[Sequence[Turn]]) -> list[TokenizedConversation | UnrenderableError]:
        """Tokenize the turns of each row; model turns and their end tokens are supervised."""
        results: list[TokenizedConversation | UnrenderableError | _Rendered] = [*self._render_all(rows)]
        whole = {
            index: rendered
            for index, rendered in enumerate(results)
            if isinstance(rendered, _Rendered) and not rendered.spelled
        }
        ids_of_whole = self._encode_all([rendered.text for rendered in whole.values()])
        for (index, rendered), ids in zip(whole.items(), ids_of_whole, strict=True):
            results[index] = self._by_anchors(rendered, ids) or rendered
        missed = {index: rendered for index, rendered in whole.items() if results[index] is rendered}
        if missed and self.tokenizer.is_fast:
            texts = [rendered.text for rendered in missed.values()]
            encodings = self._backend.encode_batch(texts, add_special_tokens=False)
            for (index, rendered), encoding in zip(missed.items(), encodings, strict=True):
                results[index] = self._tokenize(rendered, encoding)
        return [self._tokenize(result, None) if isinstance(result, _Rendered) else result for result in results]

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        if not self.tokenizer.is_fast:
            return [list(self.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False) if texts else []
        return [encoding.ids for encoding in encodings]

    def identity(self) -> dict[str, Any]:
        """The template, and the date that it writes."""
        return {"template": self.template, "day": self.day and self.day.isoformat()}

    @cached_property
    def _normalizes_tokens(self) -> bool:
        """Whether normalization may turn a text into a control token that it does not spell."""
        if self.tokenizer.is_fast and self.tokenizer.backend_tokenizer.normalizer is None:
            return False
        return any(getattr(token, "normalized", True) for token in self.tokenizer.added_tokens_decoder.values())

    @cached_property
    def _backend(self) -> Any:
        return with_plain_offsets(self.tokenizer.backend_tokenizer)

    # ---- rendering

    def _render_all(self, rows: Sequence[Sequence[Turn]]) -> list[_Rendered | UnrenderableError]:
        skeletons = [self._skeleton(shape_of(turns)) for turns in rows]
        rendered_rows = [
            (system_in_front(turns) if encoded.skeleton.system_in_front else turns, encoded)
            for turns, encoded in zip(rows, skeletons, strict=True)
            if isinstance(encoded, _EncodedSkeleton)
        ]
        texts = self._texts([turns for turns, _ in rendered_rows])
        rendered = iter(
            text if isinstance(text, UnrenderableError) else _error_as_value(self._match, *row, text)
            for row, text in zip(rendered_rows, texts, strict=True)
        )
        return [next(rendered) if isinstance(encoded, _EncodedSkeleton) else encoded for encoded in skeletons]

    def _match(self, turns: Sequence[Turn], encoded: _EncodedSkeleton, text: str) -> _Rendered:
        contents = find_contents(text, encoded.skeleton, turns)
        spelled = sum(map(self.plain.spells_control_token, contents))
        return _Rendered(turns, encoded, text, contents, spelled)

    def _skeleton(self, shape: ConversationShape) -> _EncodedSkeleton | UnrenderableError:
        if shape not in self._skeletons:
            if len(self._skeletons) >= MAX_SKELETONS:
                self._skeletons.clear()
            skeleton = build_skeleton(shape, self._text)
            self._skeletons[shape] = (
                _EncodedSkeleton(skeleton, self._anchors(skeleton, shape), skeleton.rules())
                if isinstance(skeleton, TemplateSkeleton)
                else skeleton
            )
        return self._skeletons[shape]

    def _anchors(self, skeleton: TemplateSkeleton, shape: ConversationShape) -> list[list[int]] | None:
        """The ids of the pieces, if each piece that follows a content begins with a control token."""
        ids = [self._piece(piece) for piece in skeleton.pieces]
        if not all(piece and piece[0] in self.plain.control_ids for piece in ids[1:]):
            return None
        roles = [role for role, _ in shape[int(skeleton.system_in_front) :]]
        ends = [ids[index + 1][0] for index, number in enumerate(skeleton.order) if roles[number] == "model"]
        try:
            self._check_ends(ends, skeleton.pieces)
        except UnrenderableError:
            return None  # the error is raised where the skeleton is used
        return ids

    def _texts(self, rows: Sequence[Sequence[Turn]]) -> Sequence[str | UnrenderableError]:
        """The text of each row; all rows in one call unless one is at fault or the tokenizer has its own method."""
        from transformers import PreTrainedTokenizerBase

        if rows and type(self.tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template:
            with suppress(*TEMPLATE_ERRORS):
                return self._apply([_messages(turns) for turns in rows])
        return [_error_as_value(self._text, turns) for turns in rows]

    def _text(self, turns: Sequence[Turn]) -> str:
        try:
            return self._apply(_messages(turns))
        except TEMPLATE_ERRORS as error:
            raise UnrenderableError(f"the chat template refuses it: {error}") from None

    def _apply(self, messages: list[Any]) -> Any:
        return apply_template(self.tokenizer, messages, self.template, tokenize=False)

    # ---- tokens

    def _by_anchors(self, rendered: _Rendered, ids: list[int]) -> TokenizedConversation | None:
        """Locate the contents between the ids of the pieces; None if a token crosses the edge of a content.

        This is fast, and works if each piece begins with a control token.
        """
        anchors = rendered.encoded.anchors
        if anchors is None or ids[: len(anchors[0])] != anchors[0]:
            return None
        position = len(anchors[0])
        tokenized = rendered.with_ids(ids)
        for index, anchor in enumerate(anchors[1:]):
            try:
                stop = ids.index(anchor[0], position)
            except ValueError:
                return None
            start, position = position, stop + len(anchor)
            if start == stop or ids[stop:position] != anchor:
                return None
            if self._normalizes_tokens and not self.plain.control_ids.isdisjoint(ids[start:stop]):
                return None
            rendered.add_turn(tokenized, index, start, stop + (rendered.turn(index).role == "model"))
        if position != len(ids) or not self._is_verified(rendered, ids):
            return None
        return tokenized

    def _tokenize(self, rendered: _Rendered, encoding: Any) -> TokenizedConversation | UnrenderableError:
        if encoding is None:
            return _error_as_value(self._piece_by_piece, rendered)
        if not self._is_verified(rendered, encoding.ids):
            return UnrenderableError("this tokenizer encodes a chat in another way than it encodes the chat's text")
        try:
            return _error_as_value(self._by_offsets, rendered, encoding)
        except _SpecialTokenLeak:
            return self._tokenize(rendered, None)

    def _is_verified(self, rendered: _Rendered, ids: list[int]) -> bool:
        """Whether the ids are those of the tokenizer's own method; compared once per skeleton."""
        if not rendered.encoded.is_verified:
            expected = apply_template(self.tokenizer, _messages(rendered.turns), self.template, return_dict=False)
            rendered.encoded.is_verified = list(expected) == ids
        return rendered.encoded.is_verified

    def _by_offsets(self, rendered: _Rendered, encoding: Any) -> TokenizedConversation:
        ids, pieces = encoding.ids, rendered.skeleton.pieces
        tokenized = rendered.with_ids(ids)
        end, end_tokens = 0, []
        for index, content in enumerate(rendered.contents):
            begin = end + len(pieces[index])
            end = begin + len(content)
            supervised = rendered.number_of(index) if rendered.turn(index).is_supervised else None
            start, stop = self._tokens_between(encoding, begin, end, rendered.text, supervised_turn=supervised)
            if rendered.turn(index).role == "model":
                stop = self._end_of_turn(ids, stop, rendered.number_of(index)) + 1
                end_tokens.append(ids[stop - 1])
            rendered.add_turn(tokenized, index, start, stop)
        self._check_ends(end_tokens, pieces)
        return tokenized

    def _tokens_between(
        self, encoding: Any, begin: int, end: int, text: str, *, supervised_turn: int | None
    ) -> tuple[int, int]:
        """The tokens that overlap the characters `begin` to `end`, never control tokens of the template."""
        start = encoding.char_to_token(begin)
        stop = encoding.char_to_token(end) if end < len(text) else len(encoding)
        if start is not None and stop is not None and encoding.token_to_chars(start)[0] == begin:
            is_aligned = end == len(text) or encoding.token_to_chars(stop)[0] == end
            if is_aligned and self.plain.control_ids.isdisjoint(encoding.ids[start:stop]):
                return start, stop
        inside = []
        for index, (token_id, (left, right)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            if right <= begin or left >= end or left == right:
                continue
            outside = (text[left:begin] + text[end : max(right, end)]).strip()
            content = text[max(left, begin) : min(right, end)].strip()
            if token_id in self.plain.control_ids:
                if content:
                    raise _SpecialTokenLeak
            elif outside and content and supervised_turn is not None:
                place = f"the template's {outside!r} and {content!r} of turn {supervised_turn}"
                raise UnrenderableError(f"one token holds {place}")
            elif content or not outside:  # white space that is part of a token of the template is context
                inside.append(index)
        if not inside:
            raise UnrenderableError("a turn has no token of its own")
        return inside[0], inside[-1] + 1

    def _piece_by_piece(self, rendered: _Rendered) -> TokenizedConversation:
        tokenized, end_tokens = rendered.with_ids([]), []
        pieces = rendered.skeleton.pieces
        tokenized.add(self._piece(pieces[0]), supervised=False)
        for index, ids in enumerate(self.plain.encode_all(rendered.contents)):
            start = len(tokenized.input_ids)
            stop = start + len(ids)
            tokenized.add([*ids, *self._piece(pieces[index + 1])], supervised=False)
            if rendered.turn(index).role == "model":
                stop = self._end_of_turn(tokenized.input_ids, stop, rendered.number_of(index)) + 1
                end_tokens.append(tokenized.input_ids[stop - 1])
            rendered.add_turn(tokenized, index, start, stop)
        self._check_ends(end_tokens, pieces)
        self._check_pieces(rendered, tokenized.input_ids)
        return tokenized

    def _check_pieces(self, rendered: _Rendered, ids: list[int]) -> None:
        (whole,) = self._encode_all([rendered.text])
        if not self.tokenizer.is_fast and not rendered.spelled and whole != ids:
            raise UnrenderableError(
                "this tokenizer has no offsets and gives other tokens for the whole conversation than for its parts"
            )
        if any(whole.count(token_id) < ids.count(token_id) for token_id in self.plain.control_ids.intersection(ids)):
            raise UnrenderableError(
                "this tokenizer encodes the template's control tokens otherwise inside a conversation"
            )

    def _piece(self, piece: str) -> list[int]:
        if piece not in self._encoded_pieces:
            self._encoded_pieces[piece] = self.tokenizer.encode(piece, add_special_tokens=False) if piece else []
        return self._encoded_pieces[piece]

    def _end_of_turn(self, ids: Sequence[int], position: int, turn: int) -> int:
        """The position of the token that ends the model turn whose text stops before `position`.

        It is the first control token from there on; only white space may come before it.
        """
        for end in range(position, len(ids)):
            if ids[end] in self.plain.control_ids:
                return end
            if not self._is_blank(ids[end]):
                break
        raise UnrenderableError(
            f"the chat template ends turn {turn} with no control token, so stopping could not be learned"
        )

    def _is_blank(self, token_id: int) -> bool:
        if token_id not in self._blank:
            self._blank[token_id] = not str(self.tokenizer.decode([token_id])).strip()
        return self._blank[token_id]

    def _check_ends(self, end_tokens: Sequence[int], pieces: Sequence[str]) -> None:
        """A token that ends a turn must not be one that opens turns, unless it is the tokenizer's own end token.

        A turn is opened by the last control token of the piece before it, if only white space follows that token.
        """
        openers = {self._opener(piece) for piece in pieces[:-1]} - {self.tokenizer.eos_token_id}
        if openers.intersection(end_tokens):
            raise UnrenderableError("the chat template ends a turn only with a token that opens turns")

    def _opener(self, piece: str) -> int | None:
        if piece not in self._openers:
            ids = self._piece(piece)
            controls = [index for index, token_id in enumerate(ids) if token_id in self.plain.control_ids]
            opens = bool(controls) and all(map(self._is_blank, ids[controls[-1] + 1 :]))
            self._openers[piece] = ids[controls[-1]] if opens else None
        return self._openers[piece]


class _SpecialTokenLeak(Exception):
    """Normalization turned a content into a control token that it does not spell."""


def _error_as_value(function: Callable[..., Result], *arguments: Any) -> Result | UnrenderableError:
    try:
        return function(*arguments)
    except UnrenderableError as error:
        return error


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": TEMPLATE_ROLES[turn.role], "content": turn.text} for turn in turns]
