"""Chat templates in Jinja, the tokenizer's own or another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any

from finetune.chat_templates.chat_template import ChatTemplate, RenderedText, error_as_value
from finetune.chat_templates.example import (
    IGNORE_INDEX,
    SupervisedSpan,
    TokenizedConversation,
    TurnSpan,
    UnrenderableError,
)
from finetune.chat_templates.messages import normalized, without_reasoning
from finetune.chat_templates.plain_text import PlainTextTokenizer
from finetune.chat_templates.template_skeleton import OTHER_TEMPLATE, shape_of, with_date
from finetune.chat_templates.token_positions import Extent, JoinedPromptError, TokenPositions, TokenSpan
from finetune.conversation import DEFAULT_SETTINGS, ChatSettings, Conversation, trained_on

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_VERIFIED = 4096  # shapes


class JinjaFormat:
    """A Jinja chat template, the tokenizer's own or another.

    Each conversation is rendered once and must consist of the pieces of its skeleton around its contents (see
    `template_skeleton`). One tokenization of the whole then gives exactly the ids of `apply_chat_template`, and
    `token_positions` tells which tokens belong to a model turn, and whether those in front of it are the ids of the
    prompt alone. If not, or if contents spell a control token, what stands between control tokens is encoded by itself.

    Args:
        day: the date that the template writes; default: today in UTC.
        tool_template: the template of conversations with tools; default: `template`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        name: str,
        settings: ChatSettings = DEFAULT_SETTINGS,
        day: date | None = None,
        tool_template: str | None = None,
    ) -> None:
        given = [template] if tool_template is None else [template, tool_template]
        self.day = (day or datetime.now(UTC).date()) if any("strftime_now" in text for text in given) else None
        self.templates = [with_date(text, self.day) if self.day else text for text in given]
        self.tokenizer, self.name = tokenizer, name
        self.template_kwargs, self.history = dict(settings.template_kwargs), settings.history
        self.masks_reasoning = settings.reasoning == "context"
        self.plain = PlainTextTokenizer(tokenizer, settings.content_tokens)
        self.positions = TokenPositions(self.plain)
        self._of_chats, *with_tools = (
            ChatTemplate(self.plain, text, self.template_kwargs, as_is=self.history == "as_is")
            for text in self.templates
        )
        self._of_tools = with_tools[0] if with_tools else self._of_chats
        self._verified: set[Any] = set()

    def identity(self) -> dict[str, Any]:
        """The template, its variables, and how histories and reasoning are treated."""
        return {
            "template": self.templates[0] if len(self.templates) == 1 else self.templates,
            "day": self.day and self.day.isoformat(),
            "template_kwargs": self.template_kwargs,
            "history": self.history,
            "masks_reasoning": self.masks_reasoning,
        }

    def split_history(self, conversation: Conversation) -> list[Conversation]:
        """One conversation for all answers that stand behind the prompt of serving in it, and so on for the others."""
        turns = conversation.turns
        rest = {number for number, turn in enumerate(turns) if turn.is_supervised}
        parts: list[Conversation] = []
        last = len(turns) - 1
        while rest:
            part = conversation if last == len(turns) - 1 else replace(conversation, turns=turns[: last + 1])
            try:
                skeleton = self._template_of(part).skeleton_of_shape(normalized(part))
            except UnrenderableError:
                return [conversation]  # tokenizing it says why
            shift = int(skeleton.system_in_front)
            here = {number for number in rest if number - shift in skeleton.answers and number <= last}
            if not here and last == max(rest):  # tokenizing it says why
                return [replace(part, turns=trained_on(part.turns, {last}))]
            if len(here) == len(rest) and not parts:
                return [part]
            if here:
                parts.append(replace(part, turns=trained_on(part.turns, here)))
            rest -= here
            last = max(rest, default=0)
        return parts[::-1] or [conversation]

    def tokenize_all(self, conversations: Sequence[Conversation]) -> list[TokenizedConversation | UnrenderableError]:
        """Tokenize each conversation; model turns and their end tokens are supervised."""
        results: list[TokenizedConversation | UnrenderableError | RenderedText] = [*self._render_all(conversations)]
        whole = {
            index: rendered
            for index, rendered in enumerate(results)
            if isinstance(rendered, RenderedText) and not rendered.spelled
        }
        ids_of_whole = self.plain.encode_chats([rendered.text for rendered in whole.values()])
        for (index, rendered), ids in zip(whole.items(), ids_of_whole, strict=True):
            if not self._is_verified(rendered, ids):
                results[index] = UnrenderableError(
                    "this tokenizer encodes a chat in another way than it encodes the chat's text, so no "
                    "--chat_template can be followed with it: give a --model_name_or_path with another tokenizer"
                )
                continue
            extents = rendered.extents(masks_reasoning=self.masks_reasoning)
            has_results = any(turn.role == "tool" for turn in rendered.conversation.turns)
            spans = self.positions.by_controls(rendered.text, ids, extents, has_results=has_results)
            if spans is None:
                results[index] = error_as_value(self._by_segments, rendered, ids)
            else:
                results[index] = self._labelled(rendered, ids, extents, spans)
        return [
            error_as_value(self._by_segments, result) if isinstance(result, RenderedText) else result
            for result in results
        ]

    def _template_of(self, conversation: Conversation) -> ChatTemplate:
        """The template that `apply_chat_template` takes for the conversation."""
        return self._of_tools if conversation.tools else self._of_chats

    def _render_all(self, conversations: Sequence[Conversation]) -> list[RenderedText | UnrenderableError]:
        if self._of_tools is self._of_chats:
            return self._of_chats.render_all(conversations)
        rendered: dict[int, RenderedText | UnrenderableError] = {}
        for template in (self._of_chats, self._of_tools):
            numbers = [number for number, row in enumerate(conversations) if self._template_of(row) is template]
            rows = [conversations[number] for number in numbers]
            rendered |= zip(numbers, template.render_all(rows), strict=True)
        return [rendered[number] for number in range(len(conversations))]

    # ---- tokens

    def _is_verified(self, rendered: RenderedText, ids: list[int]) -> bool:
        """Whether the ids are those of the tokenizer's own method; compared once per shape."""
        shape = shape_of(rendered.conversation)
        if shape not in self._verified and not rendered.skeleton.is_completion:
            template = self._template_of(rendered.conversation)
            if list(template.apply(rendered.conversation, return_dict=False)) != ids:
                return False
            if len(self._verified) >= MAX_VERIFIED:
                self._verified.clear()
            self._verified.add(shape)
        return True

    def _by_segments(self, rendered: RenderedText, whole: list[int] | None = None) -> TokenizedConversation:
        if whole is None:
            (whole,) = self.plain.encode_chats([rendered.text])
        extents = rendered.extents(masks_reasoning=self.masks_reasoning)
        controls = rendered.control_tokens(self.plain)
        try:
            ids, joined, spans = self.positions.by_segments(rendered.text, whole, controls, extents)
        except JoinedPromptError as error:
            raise JoinedPromptError([turn + rendered.skeleton.system_in_front for turn in error.turns]) from None
        found, own = ([number for number in of if number in self.plain.control_ids] for of in (whole, joined))
        # What contents spell is a control token in the whole alone.
        if whole != joined if found == own else any(found.count(number) < own.count(number) for number in {*own}):
            raise UnrenderableError(
                "this tokenizer encodes the texts between control tokens otherwise inside a conversation: "
                + OTHER_TEMPLATE
            )
        return self._labelled(rendered, ids, extents, spans)

    def _labelled(
        self, rendered: RenderedText, ids: list[int], extents: Sequence[Extent], spans: Sequence[TokenSpan]
    ) -> TokenizedConversation:
        turns = rendered.conversation.turns
        labels = [IGNORE_INDEX] * len(ids)
        tokenized = TokenizedConversation(ids, labels, rules=rendered.rules, spelled=rendered.spelled)
        for extent, (start, stop) in zip(extents, spans, strict=True):
            turn, answer = turns[extent.turn], rendered.answer(extent)
            number = extent.turn + rendered.skeleton.system_in_front
            if answer is not None:
                text, num_end = rendered.text[extent.begin : extent.stop], len(answer.end_tokens)
                if answer.is_appended:
                    end: Any = self.tokenizer.convert_tokens_to_ids(answer.end_tokens[0])
                    tokenized.add([end], supervised=False)
                    stop += 1
                else:
                    text = text[: len(text) - sum(map(len, answer.end_tokens))]
                tokenized.labels[start:stop] = tokenized.input_ids[start:stop]
                supervised = without_reasoning(turn) if self.masks_reasoning else turn
                content = None if text == turn.text and not turn.tool_calls else supervised
                openings = rendered.skeleton.openings(extent.turn, masks_reasoning=self.masks_reasoning)
                tokenized.supervised_spans.append(SupervisedSpan(number, start, stop, text, num_end, content, openings))
            tokenized.turn_spans.append(TurnSpan(number, turn.role, start, stop, rendered.note(extent.turn)))
        return tokenized
