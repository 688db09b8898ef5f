"""Answers from a model, or from what a run left in its output folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.adapters import is_adapter
from finetune.errors import ConfigError


@dataclass(frozen=True)
class Answerer:
    """A loaded model and its tokenizer."""

    model: Any
    tokenizer: Any

    def answer(self, questions: Sequence[str], *, max_new_tokens: int, label: str) -> list[str]:
        """One greedy answer a question, in the tokenizer's chat template, without control tokens."""
        answers = []
        for question in tqdm(questions, label, unit=" answers"):
            prompt = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            ).to(self.model.device)
            output = self.model.generate(
                **prompt,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )
            said = output[0, prompt["input_ids"].shape[1] :]
            answers.append(self.tokenizer.decode(said, skip_special_tokens=True).strip())
        return answers


def load_answerer(folder: Path) -> Answerer:
    """Load a model folder or a run's output folder (adapter or full model), in float32 on a CPU.

    Raises:
        ConfigError: the folder holds neither.
    """
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder")
    loader = AutoPeftModelForCausalLM if is_adapter(folder) else AutoModelForCausalLM
    on_gpu = torch.cuda.is_available()
    model = loader.from_pretrained(folder, dtype=torch.bfloat16 if on_gpu else torch.float32)
    model = model.to("cuda" if on_gpu else "cpu").eval()
    return Answerer(model, AutoTokenizer.from_pretrained(folder))
