"""Find the tokens between two characters of a rendering.

    text      <s>Hi</s><m>Yes</s>
    controls  ^    ^   ^     ^          the n-th control token of the text is the n-th control token of the ids
    ids       1 ...  2  3 ...  2

A boundary is next to a control token, or behind one and some text of the template (`<|im_start|>assistant\n`), whose
ids then stand there. This needs no offsets, which cost the tokenizer time; where it fails, offsets tell.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

from finetune.chat_templates.example import UnrenderableError
from finetune.chat_templates.plain_text import PlainTextTokenizer
from finetune.chat_templates.template_skeleton import OTHER_TEMPLATE

MAX_LEAD = 200  # characters of a template's text behind a control token that are compared


class Extent(NamedTuple):
    """Characters `begin` to `stop` of a rendering that belong to a turn."""

    turn: int
    begin: int
    stop: int
    is_supervised: bool


class TokenSpan(NamedTuple):
    """Tokens `start` to `stop` of a turn."""

    start: int
    stop: int


class ControlTokenLeak(Exception):
    """The tokenizer makes a control token of a text that does not spell it, or the other way round."""


class TokenPositions:
    """Maps characters to tokens for one tokenizer."""

    def __init__(self, plain: PlainTextTokenizer) -> None:
        self.plain = plain
        unknown = {plain.tokenizer.unk_token_id} - {plain.tokenizer.eos_token_id, plain.tokenizer.bos_token_id}
        self.control_ids = plain.control_ids - unknown
        self._ids_of_text = {plain.token(token_id): token_id for token_id in self.control_ids}
        backend = plain.tokenizer.backend_tokenizer if plain.tokenizer.is_fast else None
        # Only normalization makes a control token of a text that does not spell it.
        self._normalizes = backend is None or backend.normalizer is not None
        self._leads: dict[str, list[int]] = {}

    def by_controls(
        self, text: str, ids: Sequence[int], extents: Sequence[Extent], *, has_results: bool = False
    ) -> list[TokenSpan] | None:
        """The tokens of each extent; None if a boundary cannot be found so.

        With `has_results` that of a context turn may hold some of the template's text: of several results of tools.
        """
        controls = [match for match in self.plain.control_pattern.finditer(text) if match[0] in self._ids_of_text]
        places = self._control_places(ids, [self._ids_of_text[match[0]] for match in controls])
        if places is None:
            return None
        begins, ends = [match.start() for match in controls], [match.end() for match in controls]
        begins.append(len(text))
        places.append(len(ids))
        spans: list[TokenSpan] = []
        for extent in extents:
            before, after = bisect_right(ends, extent.begin) - 1, bisect_left(begins, extent.stop)
            edge = (ends[before], places[before] + 1) if before >= 0 else (0, 0)
            start, stop = self._after(text, ids, *edge, extent), None
            if after and ends[after - 1] == extent.stop and extent.stop > extent.begin:
                stop = places[after - 1] + 1
            else:
                stop = self._before(text, ids, begins[after], places[after], extent)
            if has_results and not extent.is_supervised:
                start = start if start is not None else spans[-1].stop if spans else 0
                stop = stop if stop is not None else places[after]
            is_empty = extent.begin == extent.stop and not extent.is_supervised  # a result of a tool
            if start is None or stop is None or stop < start + (not is_empty):
                return None
            spans.append(TokenSpan(start, stop))
        return spans

    def _control_places(self, ids: Sequence[int], controls: Sequence[int]) -> list[int] | None:
        """Where these control tokens are among the ids, in order; None if others are there, or more of them."""
        if self._normalizes:
            places = [place for place, token_id in enumerate(ids) if token_id in self.control_ids]
            return places if [ids[place] for place in places] == controls else None
        places, place = [], 0
        for token_id in controls:
            try:
                place = ids.index(token_id, place)
            except ValueError:
                return None
            places.append(place)
            place += 1
        is_complete = all(ids.count(token_id) == controls.count(token_id) for token_id in {*controls})
        return places if is_complete else None

    def _after(self, text: str, ids: Sequence[int], control_end: int, place: int, extent: Extent) -> int | None:
        """The token at the beginning of an extent, behind a control token and the template's text after that."""
        lead = self._ids_of(text[control_end : extent.begin])
        return place + len(lead) if lead is not None and ids[place : place + len(lead)] == lead else None

    def _before(self, text: str, ids: Sequence[int], control_begin: int, place: int, extent: Extent) -> int | None:
        """The token after the end of an extent, in front of the template's text and the next control token."""
        between = text[extent.stop : control_begin]
        tail = self._ids_of(between)
        if tail is not None and ids[place - len(tail) : place] == tail:
            return place - len(tail)
        return None

    def _ids_of(self, text: str) -> list[int] | None:
        if not text or len(text) > MAX_LEAD:
            return None if text else []
        if text not in self._leads:
            if len(self._leads) > 1000:
                self._leads.clear()
            self._leads[text] = list(self.plain.tokenizer.encode(text, add_special_tokens=False))
        return self._leads[text]

    def by_offsets(self, text: str, encoding: Any, extents: Sequence[Extent]) -> list[TokenSpan]:
        """The tokens of each extent by the offsets of the tokens.

        Raises:
            ControlTokenLeak: the control tokens are not those of the text.
            UnrenderableError: one token holds text of the template and of an answer.
        """
        found = [token_id for token_id in encoding.ids if token_id in self.control_ids]
        written = [self._ids_of_text.get(match[0]) for match in self.plain.control_pattern.finditer(text)]
        if found != [token_id for token_id in written if token_id is not None]:
            raise ControlTokenLeak
        return [self._between(text, encoding, extent) for extent in extents]

    def _between(self, text: str, encoding: Any, extent: Extent) -> TokenSpan:
        begin, end = extent.begin, extent.stop
        start = encoding.char_to_token(begin)
        stop = encoding.char_to_token(end) if end < len(text) else len(encoding)
        if (
            start is not None and stop is not None and start < stop
            and encoding.token_to_chars(start)[0] == begin
            and (end == len(text) or encoding.token_to_chars(stop)[0] == end)
        ):  # fmt: skip
            return TokenSpan(start, stop)
        if begin == end and not extent.is_supervised:
            place = sum(left < begin for left, _ in encoding.offsets)
            return TokenSpan(place, place)
        inside = []
        for index, (token_id, (left, right)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            if right <= begin or left >= end or left == right:
                continue
            outside = (text[left:begin] + text[end : max(right, end)]).strip()
            content = text[max(left, begin) : min(right, end)].strip()
            if outside and content and extent.is_supervised and token_id not in self.control_ids:
                raise UnrenderableError(
                    f"one token holds the template's {outside!r} and {content!r} of turn {extent.turn}: give a "
                    "--chat_template that writes a control token or white space between them"
                )
            # White space that is part of a token of the template is context.
            if (content or not outside) and not (token_id in self.control_ids and outside):
                inside.append(index)
        if not inside:
            raise UnrenderableError(f"turn {extent.turn} has no token of its own: {OTHER_TEMPLATE}, or correct the row")
        return TokenSpan(inside[0], inside[-1] + 1)
