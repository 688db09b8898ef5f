"""Chat templates in Jinja, the tokenizer's own or another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from finetune.chat_templates.example import (
    IGNORE_INDEX,
    SupervisedSpan,
    TokenizedConversation,
    TurnSpan,
    UnrenderableError,
)
from finetune.chat_templates.plain_text import PlainTextTokenizer, with_plain_offsets
from finetune.chat_templates.supervision_rules import is_supervised, system_in_front
from finetune.chat_templates.template_skeleton import (
    ConversationShape,
    TemplateSkeleton,
    build_skeleton,
    find_contents,
    shape_of,
)
from finetune.conversation import Turn

MOST_GUIDES = 4096  # conversations of very many shapes must not fill the memory
TEMPLATE_ROLES = {"human": "user", "model": "assistant", "system": "system"}


@dataclass(eq=False, slots=True)
class _Guide:
    """An outline with the ids of its pieces, where these show by themselves where each content lies."""

    outline: TemplateSkeleton
    anchors: list[list[int]] | None
    rules: list[str]
    is_compared: bool = False


@dataclass(slots=True)
class _Rendered:
    """One conversation as text; `contents` stand in it in the outline's order, `shift` turns before the first."""

    turns: Sequence[Turn]
    guide: _Guide
    text: str
    contents: list[str]
    spelled: int

    @property
    def outline(self) -> TemplateSkeleton:
        return self.guide.outline

    @property
    def shift(self) -> int:
        return int(self.guide.outline.system_in_front)

    def layout(self) -> TokenizedConversation:
        return TokenizedConversation(rules=self.guide.rules, spelled=self.spelled)


class JinjaFormat:
    """A Jinja chat template, the tokenizer's own or another.

    Each conversation is rendered once for real and must be its outline's pieces around its contents (see `outline`).
    One tokenization of the whole then gives exactly the ids of `apply_chat_template`, and its offsets say which tokens
    are a model turn's. A conversation that spells an added token is instead encoded piece by piece, its contents as
    plain text; so is any with a tokenizer that has no offsets where that is needed, and its pieces must then give the
    ids of the whole.
    """

    def __init__(self, tokenizer: Any, template: str, name: str, content_tokens: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.name = name
        self.plain = PlainTextTokenizer(tokenizer, content_tokens)
        self._guides: dict[ConversationShape, _Guide | UnrenderableError] = {}
        self._encoded_pieces: dict[str, list[int]] = {}
        self._openers: dict[str, int | None] = {}
        self._blank: dict[int, bool] = {}

    def tokenize_all(self, rows: Sequence[Sequence[Turn]]) -> list[TokenizedConversation | UnrenderableError]:
        """Tokens of each rendered conversation, its model turns and their end tokens learned."""
        found = self._render_all(rows)
        plain = [place for place, one in enumerate(found) if isinstance(one, _Rendered) and not one.spelled]
        layouts: list[Any] = list(found)
        for place, ids in zip(plain, self._ids([found[place].text for place in plain]), strict=True):
            layouts[place] = self._by_anchors(found[place], ids) or found[place]
        missed = [place for place in plain if layouts[place] is found[place] and self.tokenizer.is_fast]
        if missed:
            encodings = self._backend.encode_batch([found[place].text for place in missed], add_special_tokens=False)
            for place, encoding in zip(missed, encodings, strict=True):
                layouts[place] = self._lay_out(found[place], encoding)
        return [self._lay_out(one, None) if isinstance(one, _Rendered) else one for one in layouts]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if self.tokenizer.is_fast:
            return (
                [one.ids for one in self._backend.encode_batch_fast(texts, add_special_tokens=False)] if texts else []
            )
        return [list(self.tokenizer.encode(text, add_special_tokens=False)) for text in texts]

    def identity(self) -> dict[str, Any]:
        """The template, and the day where it writes the date."""
        day = date.today().isoformat() if "strftime_now" in self.template else None
        return {"template": self.template, "day": day}

    @cached_property
    def _normalizes_tokens(self) -> bool:
        """Whether a text may become a control token that it does not spell, by the tokenizer's normalization."""
        if self.tokenizer.is_fast and self.tokenizer.backend_tokenizer.normalizer is None:
            return False
        return any(getattr(token, "normalized", True) for token in self.tokenizer.added_tokens_decoder.values())

    @cached_property
    def _backend(self) -> Any:
        return with_plain_offsets(self.tokenizer.backend_tokenizer)

    def _render_all(self, rows: Sequence[Sequence[Turn]]) -> list[_Rendered | UnrenderableError]:
        found: list[Any] = [self._guide(shape_of(turns)) for turns in rows]
        turns_of = [
            system_in_front(turns) if isinstance(guide, _Guide) and guide.outline.system_in_front else turns
            for turns, guide in zip(rows, found, strict=True)
        ]
        places = [place for place, guide in enumerate(found) if isinstance(guide, _Guide)]
        for place, text in zip(places, self._texts([turns_of[place] for place in places]), strict=True):
            found[place] = (
                text if isinstance(text, UnrenderableError) else self._match(turns_of[place], found[place], text)
            )
        return found

    def _match(self, turns: Sequence[Turn], guide: _Guide, text: str) -> _Rendered | UnrenderableError:
        try:
            contents = find_contents(text, guide.outline, turns)
        except UnrenderableError as refusal:
            return refusal
        spelled = sum(map(self.plain.spells_control_token, contents))
        return _Rendered(turns, guide, text, contents, spelled)

    def _guide(self, shape: ConversationShape) -> _Guide | UnrenderableError:
        if shape not in self._guides:
            if len(self._guides) >= MOST_GUIDES:
                self._guides.clear()
            outline = build_skeleton(shape, self._text)
            if isinstance(outline, TemplateSkeleton):
                outline = _Guide(outline, self._anchors(outline, shape), outline.rules())
            self._guides[shape] = outline
        return self._guides[shape]

    def _anchors(self, outline: TemplateSkeleton, shape: ConversationShape) -> list[list[int]] | None:
        """The ids of the pieces, if each that follows a content begins with a control token."""
        ids = [self._piece(piece) for piece in outline.pieces]
        if not all(one and one[0] in self.plain.control_ids for one in ids[1:]):
            return None
        roles = [role for role, _ in shape[int(outline.system_in_front) :]]
        ends = {place: ids[place + 1][0] for place, turn in enumerate(outline.order) if roles[turn] == "model"}
        try:
            self._check_ends(ends, outline.pieces)
        except UnrenderableError:
            return None  # refused where it is used
        return ids

    def _all_at_once(self, rows: Sequence[Sequence[Turn]]) -> list[str] | None:
        """The rows' texts in one call, None where a tokenizer has its own way or a row is at fault."""
        from transformers import PreTrainedTokenizerBase

        if not rows or type(self.tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            return None
        try:
            return self._apply([_messages(turns) for turns in rows])
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
            return None

    def _texts(self, rows: Sequence[Sequence[Turn]]) -> list[str | UnrenderableError]:
        together = self._all_at_once(rows)
        if together is not None:
            return together
        texts: list[str | UnrenderableError] = []
        for turns in rows:
            try:
                texts.append(self._text(turns))
            except UnrenderableError as refusal:
                texts.append(refusal)
        return texts

    def _text(self, turns: Sequence[Turn]) -> str:
        try:
            return self._apply(_messages(turns))
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise UnrenderableError(f"the chat template refuses it: {error}") from None

    def _apply(self, messages: list[Any]) -> Any:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=self.template)

    def _by_anchors(self, rendered: _Rendered, ids: list[int]) -> TokenizedConversation | None:
        """The layout where each content lies between the ids of its pieces, as it does behind control tokens.

        None where it does not: a piece that does not begin with one, a token over the edge of a content.
        """
        anchors = rendered.guide.anchors
        if anchors is None or ids[: len(anchors[0])] != anchors[0]:
            return None
        at = len(anchors[0])
        layout = rendered.layout()
        layout.input_ids, layout.labels = ids, [IGNORE_INDEX] * len(ids)
        for place, number in enumerate(rendered.outline.order):
            anchor, turn = anchors[place + 1], rendered.turns[number]
            try:
                stop = ids.index(anchor[0], at)
            except ValueError:
                return None
            begin, at = at, stop + len(anchor)
            if begin == stop or ids[stop:at] != anchor:
                return None
            if self._normalizes_tokens and not self.plain.control_ids.isdisjoint(ids[begin:stop]):
                return None
            number += rendered.shift
            if turn.role == "model":
                stop += 1
                if turn.train:
                    layout.labels[begin:stop] = ids[begin:stop]
                    layout.answers.append(SupervisedSpan(number, begin, stop, rendered.contents[place]))
            layout.spans.append(TurnSpan(number, turn.role, begin, stop))
        if at != len(ids) or not self._is_as_the_tokenizer_does(rendered, ids):
            return None
        return layout

    def _lay_out(self, rendered: _Rendered, encoding: Any) -> TokenizedConversation | UnrenderableError:
        try:
            if encoding is None:
                return self._piece_by_piece(rendered)
            if not self._is_as_the_tokenizer_does(rendered, encoding.ids):
                return UnrenderableError("this tokenizer encodes a chat in another way than it encodes the chat's text")
            return self._by_offsets(rendered, encoding)
        except _Smuggled:
            return self._lay_out(rendered, None)
        except UnrenderableError as refusal:
            return refusal

    def _is_as_the_tokenizer_does(self, rendered: _Rendered, ids: list[int]) -> bool:
        """Whether the ids are those of the tokenizer's own method; asked once for each outline."""
        if rendered.guide.is_compared:
            return True
        expected = self.tokenizer.apply_chat_template(
            _messages(rendered.turns), chat_template=self.template, return_dict=False
        )
        if list(expected) != ids:
            return False
        rendered.guide.is_compared = True
        return True

    def _by_offsets(self, rendered: _Rendered, encoding: Any) -> TokenizedConversation:
        layout, pieces = rendered.layout(), rendered.outline.pieces
        layout.input_ids = ids = encoding.ids
        layout.labels = labels = [IGNORE_INDEX] * len(ids)
        at, ends = 0, {}
        for place, number in enumerate(rendered.outline.order):
            turn, begin = rendered.turns[number], at + len(pieces[place])
            at = begin + len(rendered.contents[place])
            of = number + rendered.shift if is_supervised(turn) else None
            start, stop = self._tokens_between(encoding, begin, at, rendered.text, of=of)
            if turn.role == "model":
                end = self._end_of_turn(ids, stop, number + rendered.shift)
                ends[place], stop = ids[end], end + 1
            if is_supervised(turn):
                labels[start:stop] = ids[start:stop]
                layout.answers.append(SupervisedSpan(number + rendered.shift, start, stop, rendered.contents[place]))
            layout.spans.append(TurnSpan(number + rendered.shift, turn.role, start, stop))
        self._check_ends(ends, pieces)
        return layout

    def _tokens_between(self, encoding: Any, begin: int, end: int, text: str, *, of: int | None) -> tuple[int, int]:
        """The tokens that overlap the characters `begin` to `end`; control tokens of the template never do."""
        start = encoding.char_to_token(begin)
        stop = encoding.char_to_token(end) if end < len(text) else len(encoding)
        if start is not None and stop is not None and encoding.token_to_chars(start)[0] == begin:
            clean = end == len(text) or encoding.token_to_chars(stop)[0] == end
            if clean and self.plain.control_ids.isdisjoint(encoding.ids[start:stop]):
                return start, stop
        ids, offsets = encoding.ids, encoding.offsets
        inside = []
        for token, (left, right) in enumerate(offsets):
            if right <= begin or left >= end or left == right:
                continue
            outside = (text[left:begin] + text[end : max(right, end)]).strip()
            said = text[max(left, begin) : min(right, end)].strip()
            if ids[token] in self.plain.control_ids:
                if said:
                    raise _Smuggled  # a spelling that only the tokenizer's own normalization makes a control token
            elif outside and said and of is not None:
                raise UnrenderableError(f"one token holds the template's {outside!r} and {said!r} of turn {of}")
            elif said or not outside:  # white space that went into a token of the template is context
                inside.append(token)
        if not inside:
            raise UnrenderableError("a turn has no token of its own")
        return inside[0], inside[-1] + 1

    def _piece_by_piece(self, rendered: _Rendered) -> TokenizedConversation:
        layout, ends = rendered.layout(), {}
        pieces, order = rendered.outline.pieces, rendered.outline.order
        contents = self.plain.encode_all(rendered.contents)
        layout.add(self._piece(pieces[0]), learned=False)
        for place, (number, ids) in enumerate(zip(order, contents, strict=True)):
            turn, start = rendered.turns[number], len(layout.input_ids)
            layout.add(ids, learned=is_supervised(turn))
            stop = len(layout.input_ids)
            layout.add(self._piece(pieces[place + 1]), learned=False)
            if turn.role == "model":
                end = self._end_of_turn(layout.input_ids, stop, number + rendered.shift)
                ends[place], stop = layout.input_ids[end], end + 1
            if is_supervised(turn):
                layout.labels[start:stop] = layout.input_ids[start:stop]
                layout.answers.append(SupervisedSpan(number + rendered.shift, start, stop, rendered.contents[place]))
            layout.spans.append(TurnSpan(number + rendered.shift, turn.role, start, stop))
        self._check_ends(ends, pieces)
        self._check_parts(rendered, layout.input_ids)
        return layout

    def _check_parts(self, rendered: _Rendered, ids: list[int]) -> None:
        (whole,) = self._ids([rendered.text])
        if not self.tokenizer.is_fast and not rendered.spelled and whole != ids:
            raise UnrenderableError(
                "this tokenizer has no offsets and gives other tokens for the whole conversation than for its parts"
            )
        if any(whole.count(token) < ids.count(token) for token in self.plain.control_ids.intersection(ids)):
            raise UnrenderableError(
                "this tokenizer encodes the template's control tokens otherwise inside a conversation"
            )

    def _piece(self, piece: str) -> list[int]:
        if piece not in self._encoded_pieces:
            self._encoded_pieces[piece] = self.tokenizer.encode(piece, add_special_tokens=False) if piece else []
        return self._encoded_pieces[piece]

    def _end_of_turn(self, ids: Sequence[int], after: int, turn: int) -> int:
        """The position of the token that ends the model turn whose text stops before position `after`.

        It is the first control token from there on; only white space may lie between.
        """
        for position in range(after, len(ids)):
            if ids[position] in self.plain.control_ids:
                return position
            if not self._is_blank(ids[position]):
                break
        raise UnrenderableError(
            f"the chat template ends turn {turn} with no control token, so stopping could not be learned"
        )

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self.tokenizer.decode([token]).strip()
        return self._blank[token]

    def _check_ends(self, ends: dict[int, int], pieces: Sequence[str]) -> None:
        """A token that ends a turn must not be one that opens turns, unless it is the tokenizer's own end token.

        A turn is opened by the last control token of the piece in front of it, if only white space follows that.
        """
        openers = {self._opener(piece) for piece in pieces[:-1]} - {self.tokenizer.eos_token_id}
        if openers.intersection(ends.values()):
            raise UnrenderableError("the chat template ends a turn only with a token that opens turns")

    def _opener(self, piece: str) -> int | None:
        if piece not in self._openers:
            ids = self._piece(piece)
            controls = [place for place, one in enumerate(ids) if one in self.plain.control_ids]
            opens = bool(controls) and all(map(self._is_blank, ids[controls[-1] + 1 :]))
            self._openers[piece] = ids[controls[-1]] if opens else None
        return self._openers[piece]


class _Smuggled(Exception):
    """A content became a control token although it does not spell one."""


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": TEMPLATE_ROLES[turn.role], "content": turn.text} for turn in turns]
