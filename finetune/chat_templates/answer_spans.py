"""Which characters of a rendering a model turn is supervised on: what the model must write when it is served.

    prompt of serving   <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n
    answer                                                                    <think>\n\n</think>\n\nYes<|im_end|>

An answer begins where the prompt of serving ends (`add_generation_prompt=True`), and ends with the end tokens that it
has as the last turn. If the template writes it otherwise once other turns follow (Qwen3 leaves out earlier reasoning),
it cannot be supervised there: it needs a conversation that ends with it. If the prompt does not lead to what the
template writes (R1's ends with `<think>`), the answer is put behind the prompt. Reasoning that the template leaves out,
writing an empty `<think></think>` for it (Kimi-K2-Thinking), is put there.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from finetune.chat_templates.answer_ends import (
    AnswerEnd,
    TemplateText,
    common_size,
    find_end,
    shared_lines,
    shared_size,
    skip_blank,
    without_prompt,
)
from finetune.chat_templates.example import REASONING_RULE, UnrenderableError
from finetune.chat_templates.messages import REASONING_BEGIN, REASONING_END
from finetune.chat_templates.template_skeleton import (
    OTHER_TEMPLATE,
    Answer,
    SlotSpan,
    TemplateSkeleton,
    find_slots,
    marks_in,
    marks_reasoning,
    not_written,
    pieces_between,
)
from finetune.conversation import Conversation, Turn

_EMPTY_REASONING = re.compile(rf"{REASONING_BEGIN}(\s*){REASONING_END}\s*$")
FILLED_RULE = "the reasoning of turn {turn} stands where the chat template writes an empty one"
CLOSED_RULE = "the reasoning that the prompt opens is closed empty in front of turn {turn}"
OPENING_RULE = "the prompt in front of turn {turn} ends with {opening}, where the chat template has the answer alone"
LOST_REASONING = (
    "the chat template leaves out the reasoning of turn {turn}, so the answer would be trained without it: use "
    "--reasoning drop, or a --chat_template that writes it"
)
CLOSED_REASONING = (
    "the prompt in front of turn {turn} has no reasoning, or closes it, so its reasoning would stand where a server "
    "writes none: use --reasoning drop, or other --chat_template_kwargs"
)
OTHER_PROMPT = (
    "the chat template writes another prompt in front of turn {turn} when it is served, so the supervised tokens "
    f"would not follow it: {OTHER_TEMPLATE} that writes its generation prompt in front of answers, too"
)
OPENING_END = (
    "the chat template ends turn {turn} only with a token that opens turns ({token}), so stopping could not be "
    f"supervised: {OTHER_TEMPLATE} whose turns end with a token of their own"
)
OTHERWISE_LATER = (
    "the chat template writes turn {turn} otherwise once other turns follow it, so it cannot be supervised in front of "
    "them: use --train_on last_model_turn, or give another --chat_template"
)


@dataclass(frozen=True)
class _Found:
    """An answer in the rendering of the turns up to it: `before` is that rendering up to the end of the answer."""

    before: str
    begin: int
    end: AnswerEnd
    has_prompt: bool = True

    def in_rendering(self, rendered: str, spans: Sequence[SlotSpan]) -> Answer | None:
        """The answer in a rendering; None if the template does not write it so there."""
        if not rendered.startswith(self.before):
            return None
        stop, is_appended = len(self.before), False
        if self.end.is_of_next_turn:
            start = skip_blank(rendered, stop)
            is_appended = start == len(rendered)
            if not is_appended and not rendered.startswith(self.end.tokens[0], start):
                return None
            stop = stop if is_appended else start + len(self.end.tokens[0])
        answer = _answer(self.begin, stop, rendered, spans, self.end.tokens, is_appended=is_appended)
        return replace(answer, has_prompt=self.has_prompt)


def build_skeleton(conversation: Conversation, text: TemplateText, *, as_is: bool) -> TemplateSkeleton:
    """The skeleton of a conversation with marks, and its answers.

    Args:
        as_is: supervise answers as they are written in the conversation, whatever serving would send.

    Raises:
        UnrenderableError: the template leaves out, repeats or rewrites a turn.
    """
    turns = conversation.turns
    rendered = text.render(len(turns), False)
    spans = find_slots(rendered, text.spelled)
    last = len(turns) - 1
    all_found: dict[int, _Found | TemplateSkeleton | str] = {
        number: text.once(number + 1, partial(_find, turn, number, text))
        for number, turn in enumerate(turns)
        if turn.role == "model"
    }
    completion = all_found.get(last)
    if isinstance(completion, TemplateSkeleton) and not as_is and not not_written(turns, completion.slots):
        own = replace(completion.answers[last], served_opening=_served_opening(last, text))
        return replace(completion, answers={last: own})
    if missing := not_written(turns, [span.slot for span in spans]):
        raise UnrenderableError(
            f"the chat template leaves out, repeats or rewrites turn {missing[0]}: {OTHER_TEMPLATE}"
        )
    answers, refused = dict[int, Answer](), dict[int, str]()
    for number, found in all_found.items():
        turn = turns[number]
        if isinstance(found, TemplateSkeleton):
            found = OTHER_PROMPT.format(turn=number)
        answer = None if isinstance(found, str) else found.in_rendering(rendered, spans)
        if answer is not None:
            answer = replace(answer, served_opening=_served_opening(number, text))
        elif as_is and not _loses(turn, number, spans):
            answer = _as_written(turn, number, all_found[number], rendered, spans, text)
        if answer is not None:
            answers[number] = answer
        else:
            refused[number] = found if isinstance(found, str) else OTHERWISE_LATER.format(turn=number)
    rules = [REASONING_RULE.format(turn=number) for number, turn in enumerate(turns) if _loses(turn, number, spans)]
    pieces, slots = pieces_between(rendered, spans), tuple(span.slot for span in spans)
    return TemplateSkeleton(tuple(pieces), slots, answers, refused, rules=tuple(rules))


def _as_written(
    turn: Turn,
    number: int,
    found: _Found | TemplateSkeleton | str,
    rendered: str,
    spans: Sequence[SlotSpan],
    text: TemplateText,
) -> Answer | None:
    """The answer from its first text to its end as a conversation has it, whatever serving would send."""
    here = [span for span in spans if span.slot.turn == number]
    if not here:
        return None
    stop = min((span.start for span in spans if span.start >= here[-1].stop), default=len(rendered))
    ends = found.end.tokens if isinstance(found, _Found) else ()
    if isinstance(found, TemplateSkeleton):
        ends = found.answers[number].end_tokens
    match = next((end for end in text.control.finditer(rendered, here[-1].stop, stop) if end[0] in ends[-1:]), None)
    is_of_next = isinstance(found, _Found) and found.end.is_of_next_turn  # as <|user|>, and no other
    if match is None and not (turn.tool_calls or is_of_next):
        match = text.control.match(rendered, skip_blank(rendered, here[-1].stop))
    return _answer(here[0].start, match.end(), rendered, spans, (match[0],)) if match else None


def _served_opening(number: int, text: TemplateText) -> str:
    """What the prompt of serving has behind the header of the turn: the part that earlier answers do not have."""
    if not number:
        return ""
    before, prompt = text.render(number, False), text.render(number, True)
    header = prompt[common_size(prompt, before) :]
    begin = header.find(REASONING_BEGIN)
    if begin < 0:
        with suppress(UnrenderableError):
            more = text.render_more(number + 1)
            first = next((span.start for span in find_slots(more, text.spelled) if span.slot.turn == number), 0)
            begin = next((size for size in range(len(header), 0, -1) if header[:size] in more[:first]), -1)
    return header[begin:] if begin >= 0 else ""


def _loses(turn: Turn, number: int, spans: Sequence[SlotSpan]) -> bool:
    """Whether a rendering leaves out the reasoning of this turn."""
    parts = {span.slot.part for span in spans if span.slot.turn == number}
    return marks_reasoning(turn) and "reasoning" not in parts and (bool(turn.reasoning) or "text" not in parts)


def _find(turn: Turn, number: int, text: TemplateText) -> _Found | TemplateSkeleton | str:
    """The answer where it is the last turn; a skeleton if it is put behind the prompt; why it cannot be supervised."""
    try:
        more = whole = text.render(number + 1, False)
        before, prompt = (text.render(number, False), text.render(number, True)) if number else ("", "")
    except UnrenderableError as error:
        return str(error)
    with suppress(UnrenderableError):
        more = text.render_more(number + 1)
    alone = without_prompt(whole, before, more, text)
    every = find_slots(alone, text.spelled)
    spans, others = ([span for span in every if (span.slot.turn == number) is own] for own in (True, False))
    first, context = spans[0].start if spans else None, others[-1].stop if others else 0
    opening = prompt[shared_size(before, prompt, text) :]
    header = opening if number else text.opening
    written = alone[context:first].rpartition(header)[2] if header else alone[context:first]
    end = find_end(turn, number, alone, more, written, spans, text)
    if isinstance(end, str):
        return end
    writes_none = prompt == before and alone == whole and not (number and text.opening)
    if end.tokens[-1] in _openers(alone, first if writes_none else None, opening, text) - {text.eos}:
        return OPENING_END.format(turn=number, token=end.tokens[-1])
    if marks_reasoning(turn) and prompt.rstrip().endswith(REASONING_END):
        return CLOSED_REASONING.format(turn=number)
    loses, opens_reasoning = _loses(turn, number, spans), _opens_reasoning(prompt)
    if loses and not opens_reasoning:
        empty = _EMPTY_REASONING.search(alone[:first])
        if empty is None or not opening.strip() or not alone[: empty.start()].endswith(opening):
            return LOST_REASONING.format(turn=number)
        half, reasoning = empty[1][: len(empty[1]) // 2], marks_in(turn.reasoning + turn.text)[0]
        tail = f"{REASONING_BEGIN}{half}{reasoning}{half}{alone[empty.end(1) : end.stop]}"
        filled = _completion(turn, number, prompt, tail, end, text)
        return replace(filled, rules=(FILLED_RULE.format(turn=number),))
    if prompt == before and first is not None and REASONING_END in turn.text + REASONING_END * marks_reasoning(turn):
        first = min(first, shared_size(text.render_bare(number), alone, text))  # what opens reasoning is no header
    if prompt == before and first is not None and _opens_reasoning(alone[:first]):
        first = alone.rindex(REASONING_BEGIN, 0, first)
    if alone.startswith(prompt) and not loses:
        # Where no prompt is written, the header in front of the answer stands for it.
        if writes_none and not opens_reasoning and first is not None and alone[len(prompt) : first].strip():
            return _Found(alone[: end.stop], first, end, has_prompt=False)
        return _Found(alone[: end.stop], len(prompt), end)
    asked = find_slots(prompt, text.spelled)
    # Some templates write the system turn with the last question, until it is answered.
    if len(asked) > len(others) and not loses:
        header = prompt[asked[-1].stop :]
        if alone.startswith(header, context):
            return _completion(turn, number, prompt, alone[context + len(header) : end.stop], end, text)
    if prompt == before and first is not None and not loses and prompt.rstrip().endswith(REASONING_END):
        return _completion(turn, number, prompt, alone[first : end.stop], end, text)
    if first is not None and not loses and writes_none:
        return _Found(alone[: end.stop], first, end, has_prompt=False)
    if not loses and prompt == before and (begin := shared_size(prompt, alone, text)) >= context:
        return _completion(turn, number, prompt, alone[begin : end.stop], end, text)
    if first is not None and not loses and alone[:first].rstrip() == prompt.rstrip():
        return _completion(turn, number, prompt, alone[first : end.stop], end, text)
    begin = alone.rfind(opening, context, first) if opening.strip() and not loses else -1
    if begin >= 0:  # the template writes what is in front of the prompt otherwise once the answer is there
        return _completion(turn, number, prompt, alone[begin + len(opening) : end.stop], end, text)
    if marks_reasoning(turn) and not opens_reasoning:
        return CLOSED_REASONING.format(turn=number)
    answers = [span.start for span in spans if span.slot.part != "reasoning"]
    header = opening.rstrip().removesuffix(REASONING_BEGIN).strip() if opens_reasoning else ""
    begin = alone.find(header, context, first) if header else -1
    if begin < 0 and turn.tool_calls and (shared := shared_lines(prompt, alone, text)) >= context:
        begin = shared
    elif begin < 0 and not answers:
        return OTHER_PROMPT.format(turn=number)
    else:
        begin = answers[-1] if begin < 0 else begin + len(header)
    tail = alone[begin : end.stop].rpartition(REASONING_END)[2]
    completion = _completion(turn, number, prompt, tail, end, text)
    if opens_reasoning:
        return completion
    served = prompt[shared_size(alone, prompt, text) :].strip().rpartition("\n")[2]
    return replace(completion, rules=(OPENING_RULE.format(turn=number, opening=ascii(served)),))


def _completion(
    turn: Turn, number: int, prompt: str, tail: str, end: AnswerEnd, text: TemplateText
) -> TemplateSkeleton:
    """The answer behind the prompt of serving; reasoning that the prompt opens is closed."""
    rules = []
    if _opens_reasoning(prompt):
        line = "\n" if prompt.endswith("\n") else ""
        reasoning = marks_in(turn.reasoning + turn.text)[0] if marks_reasoning(turn) else ""
        tail = f"{reasoning}{line}{REASONING_END}{2 * line}{tail.rpartition(REASONING_END)[2].lstrip()}"
        rules = [] if reasoning else [CLOSED_RULE.format(turn=number)]
    whole = prompt + tail
    spans = find_slots(whole, text.spelled)
    answer = _answer(len(prompt), len(whole), whole, spans, end.tokens, is_appended=end.is_of_next_turn)
    return TemplateSkeleton(
        tuple(pieces_between(whole, spans)),
        tuple(span.slot for span in spans),
        {number: answer},
        is_completion=True,
        rules=tuple(rules),
    )


def _opens_reasoning(prompt: str) -> bool:
    return prompt.rstrip().endswith(REASONING_BEGIN)


def _openers(alone: str, first: int | None, generation_prompt: str, text: TemplateText) -> set[str]:
    """The control tokens that open a model turn: those of the generation prompt, else the last one before the text."""
    if generation_prompt.strip():
        return {match[0] for match in text.control.finditer(generation_prompt)}
    controls = [*text.control.finditer(alone[:first])] if first is not None else []
    return {controls[-1][0]} if controls and not alone[controls[-1].end() : first].strip() else set()


def _answer(
    begin: int,
    stop: int,
    rendered: str,
    spans: Sequence[SlotSpan],
    end_tokens: tuple[str, ...],
    *,
    is_appended: bool = False,
) -> Answer:
    first, last = (sum(span.stop <= place for span in spans) for place in (begin, stop))
    start_of_first = spans[first - 1].stop if first else 0
    end_of_last = spans[last].start if last < len(spans) else len(rendered)
    return Answer((first, begin - start_of_first), (last, end_of_last - stop), end_tokens, is_appended)
