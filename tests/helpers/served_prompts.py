"""Renderings of templates that write something else around answers, and what they supervise."""

import copy
from typing import Any

from tokenizers import AddedToken

from finetune.chat_templates import IGNORE_INDEX, JinjaFormat, Renderer
from finetune.conversation import ChatSettings, Conversation, Turn

ROLES = {"human": "user", "model": "assistant", "system": "system"}


TALK = (
    Turn("system", "Be brief."), Turn("human", "q"), Turn("model", "a", reasoning="r"), Turn("human", "q2"),
    Turn("model", "a2"),
)  # fmt: skip


PLAIN = (*TALK[:2], Turn("model", "a"), *TALK[3:])


def renderer_of(smol_tokenizer, template: str, special: str, kwargs: dict, **options: Any) -> Renderer:
    tokenizer, tokens = copy.deepcopy(smol_tokenizer), special.split()
    tokenizer.add_special_tokens({"additional_special_tokens": tokens, "bos_token": tokens[0], "eos_token": tokens[-1]})
    tags = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer.add_tokens([AddedToken(token, special=False) for token in tags])
    settings = ChatSettings(template_kwargs=kwargs, **options)
    return Renderer(JinjaFormat(tokenizer, template, "test", settings), 10_000)


def prompts_and_answers(renderer: Renderer, conversation: Conversation) -> list[tuple[list[int], str]]:
    """The ids in front of each supervised run, and its text."""
    rendering, found = renderer.render(conversation), []
    for example in rendering.examples:
        is_supervised = [label != IGNORE_INDEX for label in [*example.labels, IGNORE_INDEX]]
        begins = [place for place, is_own in enumerate(is_supervised) if is_own and not is_supervised[place - 1]]
        for begin in begins:
            end = is_supervised.index(False, begin)
            found.append((example.input_ids[:begin], renderer.format.tokenizer.decode(example.labels[begin:end])))
    return found


def served_ids(renderer: Renderer, template: str, turns: tuple[Turn, ...]) -> list[int]:
    messages = [{"role": ROLES[turn.role], "content": turn.text} for turn in turns]
    options = {"chat_template": template, "add_generation_prompt": True, "return_dict": False}
    return renderer.format.tokenizer.apply_chat_template(messages, **options)
