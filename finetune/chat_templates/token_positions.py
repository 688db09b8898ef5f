"""Find the tokens between two characters of a rendering.

    text      <s>Hi</s><m>Yes</s>
    controls  ^    ^   ^     ^          the n-th control token of the text is the n-th control token of the ids
    ids       1 ...  2  3 ...  2

A boundary is next to a control token, or behind one and some text of the template (`<|im_start|>assistant\n`), whose
ids then stand there: the tokens in front of an answer are those of the prompt alone. Where this fails, the segments
between control tokens are encoded each by itself.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from typing import NamedTuple

from finetune.chat_templates.example import UnrenderableError
from finetune.chat_templates.plain_text import PlainTextTokenizer
from finetune.chat_templates.template_skeleton import OTHER_TEMPLATE

MAX_LEAD = 200  # characters of a template's text behind a control token that are compared
ENCODED_AT_ONCE = 6  # beginnings of a segment; behind more edges, what has been encoded is not encoded again
NO_PROMPT = -1  # the end of the prompt in front of a turn that is not generated
JOINED = "the tokenizer joins the end of a prompt with its answer: let the answer not begin with white space"

Encode = Callable[[Sequence[str]], list[list[int]]]


class Extent(NamedTuple):
    """Characters `begin` to `stop` of a rendering that belong to a turn; `prompt_end`: of the prompt of an answer."""

    turn: int
    begin: int
    stop: int
    is_supervised: bool
    prompt_end: int


class TokenSpan(NamedTuple):
    """Tokens `start` to `stop` of a turn."""

    start: int
    stop: int


class JoinedPromptError(UnrenderableError):
    """The tokenizer joins the answers `turns` with their prompts, and other turns follow them."""

    def __init__(self, turns: Sequence[int]) -> None:
        super().__init__(JOINED)
        self.turns = turns


class TokenPositions:
    """Maps characters to tokens for one tokenizer."""

    def __init__(self, plain: PlainTextTokenizer) -> None:
        self.plain = plain
        unknown = {plain.tokenizer.unk_token_id} - {plain.tokenizer.eos_token_id, plain.tokenizer.bos_token_id}
        self.control_ids = plain.control_ids - unknown
        self._ids_of_text = {plain.token(token_id): token_id for token_id in plain.control_ids}
        self._leads: dict[str, list[int]] = {}

    def by_controls(
        self, text: str, ids: Sequence[int], extents: Sequence[Extent], *, has_results: bool = False
    ) -> list[TokenSpan] | None:
        """The tokens of each extent; None if a boundary cannot be found so.

        With `has_results` that of a context turn may hold some of the template's text: of several results of tools.
        """
        controls = [
            match
            for match in self.plain.control_pattern.finditer(text)
            if self._ids_of_text[match[0]] in self.control_ids
        ]
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
            start, stop = self._after(text, ids, *edge, extent.begin), None
            if extent.is_supervised and NO_PROMPT < extent.prompt_end < extent.begin:  # its reasoning is context
                before = bisect_right(ends, extent.prompt_end) - 1
                edge = (ends[before], places[before] + 1) if before >= 0 else (0, 0)
                if self._after(text, ids, *edge, extent.prompt_end) is None:
                    return None
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
        """Where the control tokens are among the ids, in order; None if they are not exactly these."""
        places = [*compress(range(len(ids)), map(self.control_ids.__contains__, ids))]
        return places if [ids[place] for place in places] == controls else None

    def _after(self, text: str, ids: Sequence[int], control_end: int, place: int, begin: int) -> int | None:
        """The token at the beginning of an extent, behind a control token and the template's text after that."""
        lead = self._ids_of(text[control_end:begin])
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

    def by_segments(
        self, text: str, ids_of_text: list[int], controls: Sequence[re.Match[str]], extents: Sequence[Extent]
    ) -> tuple[list[int], list[int], list[TokenSpan]]:
        """Encode what stands between these control tokens by itself: nothing else of the text becomes one.

        A tokenizer may join the end of a prompt with the first letters of the answer, `<think>\\n` and `\\n</think>` to
        `\\n\\n`. A server encodes the prompt alone, so the last answer is then encoded by itself as well.

        Returns:
            The ids, what they were without this separation, and the tokens of each extent.

        Raises:
            JoinedPromptError: answers that other turns follow are joined with their prompts.
            UnrenderableError: the answer alone is encoded to another text.
        """
        prompts = {extent.prompt_end: extent.turn for extent in extents if extent.is_supervised}
        edges = sorted({edge for extent in extents for edge in (extent.begin, extent.stop, extent.prompt_end)})
        begins, stops = [0, *(match.end() for match in controls)], [*(match.start() for match in controls), len(text)]
        names = ["", *(match[0] for match in controls), ""]
        segments = [text[begin:stop] for begin, stop in zip(begins, stops, strict=True)]
        ids, joined, joined_turns = list[int](), list[int](), list[int]()
        places: dict[int, int] = {}
        around = zip(names, segments, names[1:], strict=False)
        encoded = self.plain.encode_chats(["".join(parts) for parts in around]) if controls else [ids_of_text]
        for begin, stop, before, segment, after, own in zip(
            begins, stops, names, segments, names[1:], encoded, strict=False
        ):
            if before:
                places[begin - len(before)] = len(ids)
                ids.append(self._ids_of_text[before])
                joined.append(ids[-1])
            inside = None if self.plain.control_pattern.search(segment) else self._inside(own, before, after)
            encode = self.plain.encode_all if inside is None else partial(self._behind, before)
            own = self.plain.encode(segment) if inside is None else inside
            joined += own
            places[begin] = len(ids)
            inner = edges[bisect_right(edges, begin) : bisect_left(edges, stop)]
            heads = encode([text[begin:edge] for edge in inner[:ENCODED_AT_ONCE]])
            first, known = begin, (begin, 0)
            for index, edge in enumerate(inner):
                head = heads[index] if index < len(heads) and first == begin else None
                if edge in prompts:
                    head = encode([text[first:edge]])[0] if head is None else head
                    if own[: len(head)] != head and edge == extents[-1].prompt_end:
                        own = self._separated(head, text[edge:stop], own, encode)
                        ids += head
                        first, head = edge, []
                    elif own[: len(head)] != head:
                        joined_turns.append(prompts[edge])
                    known, count = (edge, len(head)), len(head)
                elif head is not None and own[: len(head)] == head:
                    known, count = (edge, len(head)), len(head)
                else:
                    known, count = self._boundary(text, own, first, known, edge, encode)
                places[edge] = len(ids) + min(count, len(own))
            ids += own
            places[stop] = len(ids)
        if joined_turns:
            raise JoinedPromptError(joined_turns)
        return ids, joined, [TokenSpan(places[extent.begin], places[extent.stop]) for extent in extents]

    def _boundary(
        self, text: str, ids: list[int], first: int, known: tuple[int, int], edge: int, encode: Encode
    ) -> tuple[tuple[int, int], int]:
        """How many of the ids stand in front of an edge, and a boundary: a character with the ids in front of it.

        `ids` are those of the text from `first` on. The text from the `known` boundary on is encoded, in order not to
        encode all in front of it again for each edge. A token may hold the space in front of a word.
        """
        begin, count = known
        parts = (text[begin:edge], text[begin:edge].rstrip())
        ways = [encode(parts)] if begin == first else [encode(parts), self._behind_line(parts, encode)]
        for part, head in ((part, head) for way in ways for part, head in zip(parts, way, strict=False)):
            if ids[count : count + len(head)] == head:
                return (begin + len(part), count + len(head)), count + len(head)
        whole, stripped = encode([text[first:edge], text[first:edge].rstrip()])
        if ids[: len(whole)] == whole:
            return (edge, len(whole)), len(whole)
        return known, len(stripped)

    def _inside(self, ids: list[int], before: str, after: str) -> list[int] | None:
        """The ids between those of two control tokens; None if there are others."""
        inside = ids[bool(before) : len(ids) - bool(after)]
        is_between = not before or ids[0] == self._ids_of_text[before]
        return inside if is_between and self.control_ids.isdisjoint(inside) else None

    def _behind(self, before: str, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.plain.encode_chats([before + text for text in texts])
        inside = [self._inside(ids, before, "") for ids in encoded]
        return [self.plain.encode(text) if ids is None else ids for text, ids in zip(texts, inside, strict=True)]

    def _separated(self, head: list[int], text: str, joined: list[int], encode: Encode) -> list[int]:
        """The ids of an answer alone, of which the text is that of the ids joined with the prompt."""
        candidates = [*encode([text]), *self._behind_line([text], encode)]
        expected, *texts = self.plain.decode_all([joined, *(head + ids for ids in candidates)])
        if expected not in texts:
            raise UnrenderableError(f"this tokenizer cannot encode an answer apart from its prompt: {OTHER_TEMPLATE}")
        return candidates[texts.index(expected)]

    def _behind_line(self, texts: Sequence[str], encode: Encode) -> list[list[int]]:
        """The ids of texts behind a line, where some tokenizers write no space; none if one begins in the line."""
        line, *behind = encode(["\n", *("\n" + text for text in texts)])
        found = [ids[len(line) :] for ids in behind if ids[: len(line)] == line]
        return found if len(found) == len(texts) else []
