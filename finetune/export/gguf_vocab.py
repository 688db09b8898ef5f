"""A tokenizer as GGUF writes it: its tokens, what kind each is, and how text is cut before they are looked up.

llama.cpp knows two kinds that matter here: byte-level BPE (`gpt2`), whose regular expressions it has under names of its
own, and BPE over characters with bytes to fall back on (`llama`), which joins the pair with the highest score.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from finetune.utils.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
# Names of llama.cpp for how byte-level tokenizers cut text: the regular expressions that stand in their tokenizer.json.
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BEHIND_LETTERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
CUT_BY = {
    rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}|{BEHIND_LETTERS}": "qwen2",
    rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}{{1,3}}|{BEHIND_LETTERS}": "llama-bpe",
}
SPACE = "\u2581"


@dataclass
class Vocabulary:
    """Tokens by id, their kinds, and what the kind of tokenizer needs beside them."""

    model: str
    cut: str
    tokens: list[str]
    kinds: list[int]
    tokenizer: Any
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def add_to(self, writer: Any, stop_token_id: int) -> None:
        """Write all of it; a generation ends at `stop_token_id`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.cut)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        plain = self.tokenizer("a")["input_ids"]
        begin, unknown, padding = (
            getattr(self.tokenizer, f"{name}_token_id") for name in ("bos", "unk", "pad")
        )  # fmt: skip
        writer.add_eos_token_id(stop_token_id)
        writer.add_eot_token_id(stop_token_id)
        if begin is not None:
            writer.add_bos_token_id(begin)
        if unknown is not None:
            writer.add_unk_token_id(unknown)
        if padding is not None:
            writer.add_pad_token_id(padding)
        writer.add_add_bos_token(bool(plain) and plain[0] == begin)
        writer.add_add_eos_token(False)
        if self.model == "llama":
            text = self.tokenizer("a", add_special_tokens=False)["input_ids"]
            writer.add_add_space_prefix(self.tokenizer.convert_ids_to_tokens(text)[0].startswith(SPACE))
        if self.tokenizer.chat_template:
            writer.add_chat_template(self.tokenizer.chat_template)


def vocabulary_of(tokenizer: Any, rows: int) -> Vocabulary:
    """What to write for a tokenizer of a model whose embeddings have so many rows.

    Raises:
        ConfigError: it is of a kind that cannot be written.
    """
    if not tokenizer.is_fast:
        raise ConfigError("--gguf: its tokenizer is Python code, and GGUF holds tables only")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    if parts["model"].get("type", "BPE") != "BPE":
        raise ConfigError(f"--gguf: a tokenizer of the kind {parts['model']['type']} cannot be written, only BPE")
    merges = [one if isinstance(one, str) else " ".join(one) for one in parts["model"]["merges"]]
    tokens, kinds = _tokens(tokenizer, rows)
    cuts = list(_flat(parts["pre_tokenizer"]))
    if any(one["type"] == "ByteLevel" for one in cuts):
        return Vocabulary("gpt2", _name_of(cuts), tokens, kinds, tokenizer, merges)
    if not parts["model"].get("byte_fallback"):
        raise ConfigError("--gguf: its tokenizer is neither byte-level nor does it fall back on bytes")
    place = {"".join(one.split(" ")): -float(rank) for rank, one in enumerate(merges, start=1)}
    for number, token in enumerate(tokens):
        if kinds[number] == NORMAL and len(token) == 6 and token.startswith("<0x"):
            kinds[number] = BYTE
    lowest = -float(len(merges) + 1)
    return Vocabulary("llama", "default", tokens, kinds, tokenizer, scores=[place.get(one, lowest) for one in tokens])


def _tokens(tokenizer: Any, rows: int) -> tuple[list[str], list[int]]:
    tokens, kinds = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    for token, number in tokenizer.get_vocab().items():
        tokens[number], kinds[number] = token, NORMAL
    for number, token in tokenizer.added_tokens_decoder.items():
        tokens[number], kinds[number] = str(token), CONTROL if token.special else USER_DEFINED
    if tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = UNKNOWN
    return tokens, kinds


def _flat(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [inner for one in part["pretokenizers"] for inner in _flat(one)] if part["type"] == "Sequence" else [part]


def _name_of(cuts: list[dict[str, Any]]) -> str:
    """llama.cpp's name for how this tokenizer cuts text."""
    others = [one for one in cuts if one["type"] != "ByteLevel"]
    if not others and all(one.get("use_regex", True) for one in cuts):
        return "gpt-2"
    if [one["type"] for one in others] == ["Digits"] and others[0]["individual_digits"]:
        return "smollm"
    expressions = [one["pattern"].get("Regex") for one in others if one["type"] == "Split"]
    if len(others) == len(expressions) == 1 and expressions[0] in CUT_BY:
        return CUT_BY[expressions[0]]
    raise ConfigError("--gguf: its tokenizer cuts text in a way that GGUF has no name for here")
