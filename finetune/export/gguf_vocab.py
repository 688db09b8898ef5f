"""Write a tokenizer to GGUF: its tokens and their types, and the name of its pre-tokenizer.

Two tokenizer models of llama.cpp are supported: byte-level BPE (`gpt2`), with regular expressions that llama.cpp knows
by name, and BPE over characters with byte fallback (`llama`), which merges the pair with the highest score.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from finetune.utils.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
# llama.cpp's names of the pre-tokenizers with these regular expressions in tokenizer.json.
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
OTHER_CHARACTERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
PRE_TOKENIZERS = {
    rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}|{OTHER_CHARACTERS}": "qwen2",
    rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}{{1,3}}|{OTHER_CHARACTERS}": "llama-bpe",
}
SPACE = "\u2581"


@dataclass
class Vocabulary:
    """What GGUF stores of a tokenizer."""

    model: str  # tokenizer model of llama.cpp, `gpt2` or `llama`
    pre_tokenizer: str  # llama.cpp's name of the pre-tokenizer
    tokens: list[str]  # tokens by id
    types: list[int]  # their `gguf.TokenType`
    tokenizer: Any
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def add_to(self, writer: Any, stop_token_id: int) -> None:
        """Add the vocabulary to a `gguf.GGUFWriter`; a generation ends at `stop_token_id`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre_tokenizer)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_eos_token_id(stop_token_id)
        writer.add_eot_token_id(stop_token_id)
        for name in ("bos", "unk", "pad"):
            token_id = getattr(self.tokenizer, f"{name}_token_id")
            if token_id is not None:
                getattr(writer, f"add_{name}_token_id")(token_id)
        ids = self.tokenizer("a")["input_ids"]
        writer.add_add_bos_token(bool(ids) and ids[0] == self.tokenizer.bos_token_id)
        writer.add_add_eos_token(False)
        if self.model == "llama":
            ids = self.tokenizer("a", add_special_tokens=False)["input_ids"]
            writer.add_add_space_prefix(self.tokenizer.convert_ids_to_tokens(ids)[0].startswith(SPACE))
        if self.tokenizer.chat_template:
            writer.add_chat_template(self.tokenizer.chat_template)


def vocabulary_of(tokenizer: Any, vocab_size: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer, padded to the number of embedding rows."""
    if not tokenizer.is_fast:
        raise ConfigError("--gguf: the tokenizer is Python code, and GGUF stores tables only")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    if parts["model"].get("type", "BPE") != "BPE":
        raise ConfigError(f"--gguf: the tokenizer model {parts['model']['type']} is not supported, only BPE")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    tokens, types = _tokens(tokenizer, vocab_size)
    steps = list(_flatten(parts["pre_tokenizer"]))
    if any(step["type"] == "ByteLevel" for step in steps):
        return Vocabulary("gpt2", _pre_tokenizer_name(steps), tokens, types, tokenizer, merges)
    if not parts["model"].get("byte_fallback"):
        raise ConfigError("--gguf: the tokenizer is neither byte-level nor has it a byte fallback")
    score_of = {merge.replace(" ", ""): -float(rank) for rank, merge in enumerate(merges, start=1)}
    for token_id, token in enumerate(tokens):
        if types[token_id] == NORMAL and len(token) == 6 and token.startswith("<0x"):
            types[token_id] = BYTE
    lowest = -float(len(merges) + 1)
    scores = [score_of.get(token, lowest) for token in tokens]
    return Vocabulary("llama", "default", tokens, types, tokenizer, scores=scores)


def _tokens(tokenizer: Any, vocab_size: int) -> tuple[list[str], list[int]]:
    tokens, types = [f"[PAD{token_id}]" for token_id in range(vocab_size)], [UNUSED] * vocab_size
    for token, token_id in tokenizer.get_vocab().items():
        tokens[token_id], types[token_id] = token, NORMAL
    for token_id, token in tokenizer.added_tokens_decoder.items():
        tokens[token_id], types[token_id] = str(token), CONTROL if token.special else USER_DEFINED
    if tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = UNKNOWN
    return tokens, types


def _flatten(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer, those inside of sequences included."""
    if step is None:
        return []
    return (
        [part for inner in step["pretokenizers"] for part in _flatten(inner)] if step["type"] == "Sequence" else [step]
    )


def _pre_tokenizer_name(steps: list[dict[str, Any]]) -> str:
    """Return llama.cpp's name of a byte-level pre-tokenizer."""
    others = [step for step in steps if step["type"] != "ByteLevel"]
    if not others and all(step.get("use_regex", True) for step in steps):
        return "gpt-2"
    if [step["type"] for step in others] == ["Digits"] and others[0]["individual_digits"]:
        return "smollm"
    expressions = [step["pattern"].get("Regex") for step in others if step["type"] == "Split"]
    if len(others) == len(expressions) == 1 and expressions[0] in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[expressions[0]]
    raise ConfigError("--gguf: the pre-tokenizer of this model is not supported")
