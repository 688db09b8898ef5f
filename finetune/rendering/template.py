"""Chat templates in Jinja, the tokenizer's own or another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.conversations import Turn
from finetune.rendering.examples import IGNORE_INDEX, Layout, TurnSpan, Unrenderable
from finetune.rendering.plain_text import PlainText

TEMPLATE_ROLES = {"human": "user", "model": "assistant", "system": "system"}


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
