# ruff: noqa: E501 (a family reads best on its own lines)
"""Families of chat templates: the template, the tokens of its tokenizer, and what a server gives it."""

from dataclasses import dataclass

from finetune.chat_templates.format_selection import HERMES
from tests.helpers.tool_templates import (
    COMMAND_R,
    COMMAND_R_TOKENS,
    DEEPSEEK,
    DEEPSEEK_R1,
    DEEPSEEK_TOKENS,
    GEMMA_3,
    GEMMA_4,
    GLM_4,
    GLM_4_5,
    GPT_OSS,
    GRANITE,
    LLAMA_3_1,
    MISTRAL,
    PHI_4,
    PHI_4_MINI,
    QWEN_2_5,
    QWEN_3,
)

THINK = ("<think>", "</think>")
HERMES_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


@dataclass(frozen=True)
class Family:
    """A template, the tokens of its tokenizer, and what a server gives it.

    `added` are tokens that are not special. `max_calls` of one turn; 0: no tools. `reasoning` is the key of reasoning
    beside a text; None: it is written inside the text; "": the template loses it. `parses_reasoning`: it finds reasoning
    inside a text itself.
    """

    template: str
    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    bos: str | None = None
    eos: str | None = None
    tokenizer: str = "smollm2"
    max_calls: int = 3
    text_beside_calls: bool = True
    reasoning: str | None = None
    parses_reasoning: bool = True
    reasoning_beside_calls: bool = True
    arguments_as_json: bool = False
    short_ids: bool = False
    system: bool = True
    later_system: bool = True
    kwargs: tuple[tuple[str, object], ...] = ()


IM = ("<|im_start|>", "<|im_end|>")
GLM_TOKENS = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>")
FAMILIES = {
    "qwen2.5": Family(QWEN_2_5, IM, HERMES_TOKENS[:2], None, "<|im_end|>"),
    "qwen3": Family(QWEN_3, IM, (*HERMES_TOKENS, *THINK), None, "<|im_end|>", reasoning="reasoning_content"),
    "qwen3, no thinking": Family(
        QWEN_3, IM, (*HERMES_TOKENS, *THINK), None, "<|im_end|>", reasoning="",
        kwargs=(("enable_thinking", False),),
    ),
    "llama3.1": Family(
        LLAMA_3_1, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), (),
        "<|begin_of_text|>", "<|eot_id|>", max_calls=1, text_beside_calls=False, reasoning_beside_calls=False,
    ),
    "mistral": Family(
        MISTRAL, ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        (), "<s>", "</s>", "mistral", short_ids=True, text_beside_calls=False, reasoning_beside_calls=False,
        later_system=False,
    ),
    "gemma3": Family(GEMMA_3, ("<bos>", "<start_of_turn>", "<end_of_turn>"), (), "<bos>", "<end_of_turn>", max_calls=0, later_system=False),
    "gemma4": Family(
        GEMMA_4, ("<bos>", "<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
        (), "<bos>", "<turn|>",
    ),
    "deepseek": Family(
        DEEPSEEK, DEEPSEEK_TOKENS, THINK, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "deepseek",
        arguments_as_json=True, reasoning="", later_system=False,
    ),
    "deepseek r1": Family(
        DEEPSEEK_R1, DEEPSEEK_TOKENS, THINK, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "deepseek",
        arguments_as_json=True, later_system=False,
    ),
    "glm4": Family(GLM_4, GLM_TOKENS, (), None, "<|endoftext|>", max_calls=1, text_beside_calls=False, reasoning_beside_calls=False),
    "glm4.5": Family(
        GLM_4_5, GLM_TOKENS, (*THINK, *HERMES_TOKENS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"), None, "<|endoftext|>",
        reasoning="reasoning_content",
    ),
    "hermes": Family(HERMES, IM, (), None, "<|im_end|>"),
    "gpt-oss": Family(
        GPT_OSS, ("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|call|>", "<|return|>"), (), None, "<|return|>",
        max_calls=1, text_beside_calls=False, reasoning="thinking", parses_reasoning=False,
    ),
    "command-r": Family(COMMAND_R, COMMAND_R_TOKENS, (), "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "granite": Family(GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"), (), None, "<|end_of_text|>"),
    "phi4-mini": Family(
        PHI_4_MINI, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>", "<|endoftext|>"),
        (), None, "<|endoftext|>",
    ),
    "phi4": Family(PHI_4, (*IM, "<|im_sep|>"), (), None, "<|im_end|>", max_calls=0),
}  # fmt: skip


def prepared(tokenizer, family: Family):
    """The tokenizer with the tokens and the template of a family."""
    from tokenizers import AddedToken

    named = {"bos_token": family.bos, "eos_token": family.eos}
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(family.special), **{key: token for key, token in named.items() if token}}
    )
    known = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    tokenizer.add_tokens([AddedToken(token, special=False) for token in family.added if token not in known])
    tokenizer.chat_template = family.template
    return tokenizer
