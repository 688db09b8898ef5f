"""A conversation as the text of a chat template: the characters of each turn, and the control tokens."""

import re
from bisect import bisect_right
from dataclasses import dataclass

from finetune.chat_templates.answer_ends import common_size
from finetune.chat_templates.example import STRIPPED_RULE, SYSTEM_RULE, UnrenderableError
from finetune.chat_templates.messages import REASONING_END
from finetune.chat_templates.plain_text import PlainTextTokenizer
from finetune.chat_templates.template_skeleton import Answer, TemplateSkeleton
from finetune.chat_templates.token_positions import NO_PROMPT, Extent
from finetune.conversation import Conversation

SPELLED_BESIDE = (
    "turn {turn} spells a control token in or beside a word that the chat template looks for: take the spelling out of "
    "the row"
)


@dataclass(slots=True)
class RenderedText:
    """One conversation as text, with the contents of the skeleton's slots; its system turn may be in front."""

    conversation: Conversation
    skeleton: TemplateSkeleton
    text: str
    contents: list[str]
    spelled: int = 0

    @property
    def rules(self) -> list[str]:
        """The rules by which the template changes this conversation."""
        turns = self.conversation.turns
        strips = any(
            part == "text" and number is not None and turns[number].is_supervised and content != turns[number].text
            for (number, part), content in zip(self.skeleton.slots, self.contents, strict=True)
        )
        system = [SYSTEM_RULE] if self.skeleton.system_in_front else []
        return [*system, *self.skeleton.rules, *([STRIPPED_RULE] if strips else [])]

    def extents(self, *, masks_reasoning: bool) -> list[Extent]:
        """The characters of each turn in the text, in order; an answer's are those that it is supervised on."""
        turns, starts, ends, place = self.conversation.turns, [], [], 0  # of the pieces
        for piece, content in zip(self.skeleton.pieces, [*self.contents, ""], strict=True):
            starts.append(place)
            ends.append(place + len(piece))
            place = ends[-1] + len(content)
        found: dict[int, Extent] = {}
        reasoned: dict[int, int] = {}  # where the reasoning of a turn ends
        for index, (number, part) in enumerate(self.skeleton.slots):
            if number is None:
                continue
            begin, stop = ends[index], starts[index + 1]
            begin_of_turn = found[number].begin if number in found else begin
            found[number] = Extent(number, begin_of_turn, stop, False, NO_PROMPT)
            if masks_reasoning and part == "reasoning":
                reasoned[number] = stop
            elif masks_reasoning and turns[number].role == "model" and REASONING_END in self.contents[index]:
                reasoned[number] = begin + len(self.contents[index].partition(REASONING_END)[0].rstrip())
        for number, answer in self.skeleton.answers.items():
            prompt_end, stop = starts[answer.begin[0]] + answer.begin[1], ends[answer.end[0]] - answer.end[1]
            begin = reasoned.get(number, prompt_end)
            prompt_end = prompt_end if answer.has_prompt else NO_PROMPT
            found[number] = Extent(number, begin, stop, turns[number].is_supervised, prompt_end)
        return sorted(found.values(), key=lambda extent: extent.begin)

    def control_tokens(self, plain: PlainTextTokenizer) -> list[re.Match[str]]:
        """The control tokens of the text: those of the template, and of answers those that are not special."""
        found, begin = list[re.Match[str]](), 0
        in_answers = plain.control_ids - plain.for_answers.control_ids
        names = {plain.token(token_id) for token_id in in_answers}
        ranges = list[tuple[int, int, bool]]()  # of the contents
        for piece, content, (number, _) in zip(self.skeleton.pieces, self.contents, self.skeleton.slots, strict=False):
            begin += len(piece)
            role = "" if number is None else self.conversation.turns[number].role
            before, after = 0, 0
            if number is not None and role in ("human", "system"):  # results of tools may be written as JSON
                before, after = self._around(number, begin, content, plain)
            ranges.append((begin - before, begin + len(content) + after, role == "model"))
            begin += len(content)
        begins = [begin for begin, _, _ in ranges]
        for match in plain.control_pattern.finditer(self.text):
            index = bisect_right(begins, match.start()) - 1
            is_inside = index >= 0 and match.start() < ranges[index][1]
            stop = ranges[index][1] if is_inside else [*begins, len(self.text)][index + 1]
            if match.end() <= stop and (not is_inside or (ranges[index][2] and match[0] in names)):
                found.append(match)
        return found

    def _around(self, number: int, begin: int, content: str, plain: PlainTextTokenizer) -> tuple[int, int]:
        """How many characters of a turn are in front of its content and behind it: words that the template looks for.

        Raises:
            UnrenderableError: the template rewrites them, and they spell a control token.
        """
        head, _, tail = self.conversation.turns[number].text.partition(content)
        before = common_size(head[::-1], self.text[max(0, begin - len(head)) : begin][::-1])
        after = common_size(tail, self.text[begin + len(content) : begin + len(content) + len(tail)])
        if plain.control_pattern.search(head[: len(head) - before]) or plain.control_pattern.search(tail[after:]):
            raise UnrenderableError(SPELLED_BESIDE.format(turn=number + self.skeleton.system_in_front))
        return before, after

    def note(self, number: int) -> str:
        """What a model turn holds besides its text, for display."""
        turn = self.conversation.turns[number]
        if turn.role != "model" or not (turn.reasoning or turn.tool_calls or REASONING_END in turn.text):
            return ""
        reasons = any(slot == (number, "reasoning") for slot in self.skeleton.slots) or any(
            slot == (number, "text") and REASONING_END in content
            for slot, content in zip(self.skeleton.slots, self.contents, strict=True)
        )
        calls = ", ".join(call.name for call in turn.tool_calls)
        return ", ".join(["reasoning"] * reasons + ([f"calls {calls}"] if calls else []))

    def answer(self, extent: Extent) -> Answer | None:
        """The answer of this extent, if it is supervised."""
        return self.skeleton.answers[extent.turn] if extent.is_supervised else None
