"""Conversations as text: a chat template of a tokenizer applied to them, with the skeleton of each."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

from jinja2 import TemplateError

from finetune.chat_templates.answer_ends import TemplateText, common_size
from finetune.chat_templates.answer_spans import OTHERWISE_LATER, build_skeleton
from finetune.chat_templates.example import OPENED_RULE, WORDS_RULE, UnrenderableError, system_in_front
from finetune.chat_templates.messages import (
    REASONING_BEGIN,
    REASONING_END,
    MessageStyle,
    normalized,
    replace_strings,
    template_options,
)
from finetune.chat_templates.plain_text import PlainTextTokenizer
from finetune.chat_templates.rendered_text import SPELLED_BESIDE, RenderedText
from finetune.chat_templates.template_limits import apply_template, template_limits
from finetune.chat_templates.template_skeleton import (
    OTHER_TEMPLATE,
    TemplateSkeleton,
    bare_turn,
    find_contents,
    find_pieces,
    given_text,
    mark_spelled,
    next_turn,
    rules_of_variables,
    shape_of,
    with_marks,
)
from finetune.chat_templates.template_styles import reasoning_key, takes_only_parts, tool_style
from finetune.chat_templates.tested_words import between_words, has_words, tested_words, without_words
from finetune.conversation import Conversation, ToolCall, Turn

MAX_HELD = 8_000_000  # characters: renderings and skeletons of very many shapes must not fill the memory
RENDERINGS_PER_TURN = 3  # to find the skeleton of a shape, at most
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)

Result = TypeVar("Result")
Shape = tuple[Any, ...]


class ChatTemplate:
    """A template with the tokenizer that applies it, and its variables."""

    def __init__(
        self, plain: PlainTextTokenizer, template: str, template_kwargs: Mapping[str, Any], *, as_is: bool
    ) -> None:
        self.plain, self.template = plain, template
        self.template_kwargs, self.as_is = dict(template_kwargs), as_is
        self._skeletons: dict[Shape, TemplateSkeleton | UnrenderableError] = {}
        self._marked: dict[Shape, Any] = {}  # renderings and answers of conversations with marks
        self._held = 0  # characters in both
        self._styles: dict[str, Any] = {}
        self._words = tested_words(template)
        self._refusal = ""  # of the sample that was refused last

    def apply(self, conversation: Conversation, style: MessageStyle | None = None, **options: Any) -> Any:
        """What `apply_chat_template` returns for the conversation with these options."""
        messages = (style or self._style(conversation)).messages(conversation)
        options = {**template_options(conversation, self.template_kwargs), **options}
        return apply_template(self.plain.tokenizer, messages, self.template, **options)

    def render_all(self, conversations: Sequence[Conversation]) -> list[RenderedText | UnrenderableError]:
        """Render each conversation and find its contents."""
        with template_limits(len(conversations)):
            prepared = [error_as_value(self._with_skeleton, conversation) for conversation in conversations]
            rows = [row for row in prepared if not isinstance(row, UnrenderableError)]
            texts = iter(self._texts(rows))
        return [
            row if isinstance(row, UnrenderableError) else error_as_value(self._match, *row, next(texts))
            for row in prepared
        ]

    def _with_skeleton(self, conversation: Conversation) -> tuple[Conversation, TemplateSkeleton]:
        given, conversation = conversation.turns, normalized(conversation)
        skeleton = self.skeleton_of_shape(conversation)
        opened = [number for number, turn in enumerate(given) if turn.text != conversation.turns[number].text]
        written = [number for number in opened if (number - skeleton.system_in_front, "text") in skeleton.slots]
        if written:
            rules = [OPENED_RULE.format(turn=number) for number in written if not given[number].tool_calls]
            skeleton = replace(skeleton, rules=(*skeleton.rules, *rules))
        if conversation.template_kwargs and (unused := rules_of_variables(conversation, self.template)):
            skeleton = replace(skeleton, rules=(*skeleton.rules, *unused))
        if has_words(conversation, self._words):
            skeleton = replace(skeleton, rules=(*skeleton.rules, WORDS_RULE))
        if skeleton.system_in_front:
            conversation = replace(conversation, turns=system_in_front(conversation.turns))
        self._check_supervised(conversation, skeleton)
        if skeleton.is_completion:
            conversation = _without_opening(conversation, skeleton)
            if _has_tools(conversation):
                skeleton = self._with_own_pieces(conversation, skeleton, "")
        return conversation, skeleton

    def _match(self, conversation: Conversation, skeleton: TemplateSkeleton, text: Any) -> RenderedText:
        if isinstance(text, UnrenderableError):
            raise text
        turns = conversation.turns
        if _has_tools(conversation) and not skeleton.is_completion:
            skeleton = self._with_own_pieces(conversation, skeleton, text)
        contents = find_contents(text, skeleton, without_words(conversation, self._words))
        spelled, written = 0, {slot.turn for slot in skeleton.slots}
        for (number, _), content in zip(skeleton.slots, contents, strict=True):
            turn = None if number is None else turns[number]
            plain = self.plain.for_answers if turn and turn.role == "model" else self.plain
            is_part = self._words and turn and turn.role in ("human", "system")
            spelled += plain.spells_control_token(turn.text if is_part and turn else content)
        for number, turn in enumerate(turns if self._words else ()):  # of which nothing but such words is there
            if (
                turn.role in ("human", "system")
                and number not in written
                and self.plain.spells_control_token(turn.text)
            ):
                raise UnrenderableError(SPELLED_BESIDE.format(turn=number + skeleton.system_in_front))
        return RenderedText(conversation, skeleton, text, contents, spelled)

    def _with_own_pieces(self, conversation: Conversation, skeleton: TemplateSkeleton, text: str) -> TemplateSkeleton:
        """The skeleton of a shape with the pieces of one conversation with tools."""
        calls = [[call.name, call.id, call.arguments] for turn in conversation.turns for call in turn.tool_calls]
        spells = self.plain.spells_control_token(
            json.dumps([conversation.tools, calls], ensure_ascii=False).replace('\\"', '"')
        )
        if not (skeleton.is_completion or spells):
            turns = without_words(conversation, self._words)
            pieces = find_pieces(text, skeleton, turns, self.plain.control_pattern)
            if pieces is not None and (own := skeleton.with_pieces(pieces)) is not None:
                return own
        marked, spelled = with_marks(conversation, real_tools=True, words=self._words), list[str]()
        if spells:
            marked = self._with_spelled_marked(marked, spelled)
        own = build_skeleton(marked, self._template_text(marked, is_shape=False, spelled=spelled), as_is=self.as_is)
        own = replace(own, system_in_front=skeleton.system_in_front)
        self._check_supervised(conversation, own)
        return own

    def skeleton_of_shape(self, conversation: Conversation) -> TemplateSkeleton:
        """The skeleton of all normalized conversations of this shape, with placeholders of tools and calls."""
        shape: Shape = shape_of(conversation)
        if has_words(conversation, self._words):
            shape = (*shape, *(between_words(turn.text, self._words)[1] for turn in conversation.turns))
        if shape not in self._skeletons:
            with template_limits(RENDERINGS_PER_TURN * len(conversation.turns)):
                built = error_as_value(self._build, conversation)
            self._hold(0 if isinstance(built, UnrenderableError) else sum(map(len, built.pieces)))
            self._skeletons[shape] = built
        return value_or_raise(self._skeletons[shape])

    def _hold(self, characters: int) -> None:
        self._held += characters
        if self._held > MAX_HELD:
            self._skeletons.clear()
            self._marked.clear()
            self._held = characters

    def _with_spelled_marked(self, marked: Conversation, spelled: list[str]) -> Conversation:
        """Put marks for the control tokens that declarations and calls spell; these are appended to `spelled`."""

        def mark(text: str) -> str:
            return mark_spelled(text, spelled, self.plain.control_pattern)

        def mark_call(call: ToolCall) -> ToolCall:
            own_id = call.id and mark(call.id)
            return replace(call, name=mark(call.name), id=own_id, arguments=replace_strings(call.arguments, mark))

        tools = tuple(replace_strings(tool, mark) for tool in marked.tools)
        turns = tuple(replace(turn, tool_calls=tuple(map(mark_call, turn.tool_calls))) for turn in marked.turns)
        return replace(marked, turns=turns, tools=tools)

    def _build(self, conversation: Conversation) -> TemplateSkeleton:
        """The skeleton of a shape: with placeholders of tools and calls as well."""
        turns = conversation.turns
        try:
            return self._build_as_given(conversation)
        except UnrenderableError:
            if turns[0].role != "system" or len(turns) < 3 or turns[1].role != "human":
                raise
            # The template has no system turn, or drops it: by rule it goes in front of the first human turn.
            with suppress(UnrenderableError):
                merged = replace(conversation, turns=system_in_front(turns))
                return replace(self._build_as_given(merged), system_in_front=True)
            raise

    def _build_as_given(self, conversation: Conversation) -> TemplateSkeleton:
        marked = with_marks(conversation, real_tools=False, words=self._words)
        is_shape = not has_words(conversation, self._words)
        return build_skeleton(marked, self._template_text(marked, is_shape=is_shape), as_is=self.as_is)

    def _template_text(self, marked: Conversation, *, is_shape: bool, spelled: Sequence[str] = ()) -> TemplateText:
        """What the template writes for marked turns; what is found for a shape is shared by their beginnings."""

        def once(turns: tuple[Turn, ...], what: Any, find: Callable[[], Result]) -> Result:
            if not is_shape:
                return find()
            key = *shape_of(replace(marked, turns=turns)), what
            if key not in self._marked:
                found = error_as_value(find)
                self._hold(len(key[0]) + (len(found) if isinstance(found, str) else 0))
                self._marked[key] = found
            return value_or_raise(self._marked[key])

        def text(turns: tuple[Turn, ...], prompt: bool) -> str:
            return once(turns, prompt, lambda: self._text(replace(marked, turns=turns), prompt=prompt))

        def following(count: int) -> tuple[Turn, ...]:
            # No model ends its answer with what opens a system turn.
            is_usual = count < len(turns) and turns[count].role != "system"
            return turns[count : count + 1] if is_usual else (next_turn(turns[:count]),)

        turns, has_calls = marked.turns, any(turn.tool_calls for turn in marked.turns)
        return TemplateText(
            lambda count, prompt: text(turns[:count], prompt),
            lambda count: text((*turns[:count], *following(count)), False),
            lambda number: text((*turns[:number], bare_turn(number)), False),
            lambda count, find: once((*turns[:count], *following(count)), "answer", find),
            self.plain.control_pattern,
            self.plain.tokenizer.eos_token,
            self._opening,
            has_calls and self._next_role_ends,
            spelled,
        )

    def _check_supervised(self, conversation: Conversation, skeleton: TemplateSkeleton) -> None:
        """Raise `UnrenderableError` with the reason of the first trained turn that has no answer in the skeleton."""
        for number, turn in enumerate(conversation.turns):
            if turn.is_supervised and number not in skeleton.answers:
                reason = OTHERWISE_LATER.format(turn=number + skeleton.system_in_front)
                reason = skeleton.refused.get(number, reason)
                hint = self._thinking_hint if "--reasoning drop" in reason else ""
                raise UnrenderableError(reason + hint)

    @cached_property
    def _thinking_hint(self) -> str:
        """Which variable turns on the reasoning of this template, if it has one of the usual names."""
        asked = Conversation((Turn("human", "a"),))
        for name in ("enable_thinking", "thinking"):
            with suppress(UnrenderableError):
                thinks = replace(asked, template_kwargs={name: True})
                if self._text(thinks, prompt=True) != self._text(asked, prompt=True):
                    return f" (it reasons with --chat_template_kwargs '{{\"{name}\": true}}')"
        return ""

    @cached_property
    def _opening(self) -> str:
        """The prompt that the template writes behind a plain human turn, where it is asked for one."""
        asked = Conversation((Turn("human", "a"),))
        with suppress(UnrenderableError):
            prompt = self._text(asked, prompt=True)
            return prompt[common_size(prompt, self._text(asked)) :]
        return ""

    @cached_property
    def _next_role_ends(self) -> bool:
        """Whether nothing ends an answer but the token that opens the next turn."""
        pair = Conversation((Turn("human", "a"), Turn("model", "b")))
        with suppress(UnrenderableError):
            marked = with_marks(pair, real_tools=False)
            skeleton = build_skeleton(marked, self._template_text(marked, is_shape=True), as_is=False)
            return any(answer.is_appended for answer in skeleton.answers.values())
        return False

    def _texts(self, rows: Sequence[tuple[Conversation, TemplateSkeleton]]) -> Sequence[str | UnrenderableError]:
        """The text of each row; all in one call that have no options of their own, unless one of them is at fault."""
        from transformers import PreTrainedTokenizerBase

        tokenizer, texts = self.plain.tokenizer, dict[int, Any]()
        alike = [
            index
            for index, (row, skeleton) in enumerate(rows)
            if not (row.tools or row.template_kwargs or skeleton.is_completion)
        ]
        if alike and type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template:
            with suppress(UnrenderableError, *TEMPLATE_ERRORS):
                chats = [self._style(rows[index][0]).messages(rows[index][0]) for index in alike]
                done = apply_template(tokenizer, chats, self.template, tokenize=False, **self.template_kwargs)
                texts = dict(zip(alike, done, strict=True))
        return [
            texts[index] if index in texts else error_as_value(self._real_text, *row) for index, row in enumerate(rows)
        ]

    def _real_text(self, conversation: Conversation, skeleton: TemplateSkeleton) -> str:
        if not skeleton.is_completion:
            return self._text(conversation)
        last = len(conversation.turns) - 1
        prompt = self._text(replace(conversation, turns=conversation.turns[:-1]), prompt=True)
        first, offset = skeleton.answers[last].begin
        parts = [skeleton.pieces[first][offset:]]
        for slot, piece in zip(skeleton.slots[first:], skeleton.pieces[first + 1 :], strict=True):
            given = slot.part if slot.turn is None else given_text(conversation.turns[last], slot.part).strip()
            parts += [given, piece]
        return prompt + "".join(parts)

    def _text(self, conversation: Conversation, *, prompt: bool = False) -> str:
        try:
            return str(self.apply(conversation, tokenize=False, add_generation_prompt=prompt))
        except TEMPLATE_ERRORS as error:
            raise UnrenderableError(
                f"the chat template refuses it: {error}: correct the row, or {OTHER_TEMPLATE}"
            ) from None

    def _style(self, conversation: Conversation) -> MessageStyle:
        """How the template expects the messages of this conversation; found once by rendering samples."""
        answers = [turn for turn in conversation.turns if turn.role == "model"]
        style = self._plain_style
        if conversation.tools or any(turn.tool_calls for turn in answers):
            style = replace(self._found("tools", tool_style), texts_as_parts=style.texts_as_parts)
        if any(turn.reasoning for turn in answers):
            style = replace(style, beside_key=self._found("beside", lambda render: reasoning_key(render, inside=False)))
            style = replace(style, has_plans="tool_plan" in self.template)
        if any(REASONING_END in turn.text for turn in answers):
            style = replace(style, inside_key=self._found("inside", lambda render: reasoning_key(render, inside=True)))
        return style

    def _found(self, what: str, find: Callable[[Any], Any]) -> Any:
        if what not in self._styles:
            self._refusal = ""
            self._styles[what] = error_as_value(find, self._sample_text)
            if self._refusal and isinstance(self._styles[what], UnrenderableError):
                self._styles[what] = UnrenderableError(f"{self._styles[what]} (its own reason: {self._refusal})")
        return value_or_raise(self._styles[what])

    @cached_property
    def _plain_style(self) -> MessageStyle:
        return MessageStyle(texts_as_parts=takes_only_parts(self._written))

    def _sample_text(self, conversation: Conversation, style: MessageStyle) -> str | None:
        return self._written(conversation, replace(style, texts_as_parts=self._plain_style.texts_as_parts))

    def _written(self, conversation: Conversation, style: MessageStyle) -> str | None:
        try:
            return str(self.apply(conversation, style, tokenize=False))
        except TEMPLATE_ERRORS as error:
            self._refusal = str(error)
        return None


def _without_opening(conversation: Conversation, skeleton: TemplateSkeleton) -> Conversation:
    """The conversation, its last answer without the plain text that the prompt of serving opens it with."""
    *turns, last = conversation.turns
    opening = skeleton.answers[len(turns)].served_opening.strip()
    rest = last.text.lstrip().removeprefix(opening).lstrip()
    if not opening or not rest or REASONING_BEGIN in opening or not last.text.lstrip().startswith(opening):
        return conversation
    return replace(conversation, turns=(*turns, replace(last, text=rest)))


def _has_tools(conversation: Conversation) -> bool:
    return bool(conversation.tools) or any(turn.tool_calls for turn in conversation.turns)


def error_as_value(function: Callable[..., Result], *arguments: Any) -> Result | UnrenderableError:
    """What the function returns, or the `UnrenderableError` that it raises."""
    try:
        return function(*arguments)
    except UnrenderableError as error:
        return error


def value_or_raise(value: Result | UnrenderableError) -> Result:
    """The value, unless it is an error from `error_as_value`: that is raised."""
    if isinstance(value, UnrenderableError):
        raise value
    return value
