"""Results as a run leaves them, made without one: a base in a folder, an adapter or a model in another, run.json."""

import warnings
from pathlib import Path
from typing import Any

import torch

from finetune.inference.run_result import read_result
from finetune.models.loader import model_fingerprint
from finetune.models.model_folder import weights_fingerprint
from finetune.run_dir.run_json import update_run_json
from tests.helpers.byte_tokenizer import byte_tokenizer

ROWS = 272  # of the byte tokenizer, and some to spare
SUMMARY = {"rows": 6, "tokens": 300, "supervised_tokens": 100}


def save_base(model: Any, folder: Path, tokenizer: Any = None) -> Path:
    """A model's folder, with a tokenizer."""
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def run_of(base: Path, **changed: Any) -> dict[str, Any]:
    """What run.json says of a run on `base`, rendered in LingoWhale's format."""
    model = {"name": str(base), "folder": str(base), "revision": None, "trusts_code": False,
             "fingerprint": model_fingerprint(str(base)), "weights": weights_fingerprint(str(base))}  # fmt: skip
    chat = {"format": "lingowhale", "human_token_ids": [3], "model_token_ids": [4], "content_tokens": [],
            "stop_token_id": 2}  # fmt: skip
    return {
        "model": model, "chat": chat, "precision": "float32", "arguments": {"learning_rate": 2e-5}, "world_size": 2,
        "versions": {"python": "3"}, "data": {"summary": SUMMARY, "fingerprint": "0"}, "completed": True,
        "result": {"steps": 4, "first_loss": 3.0, "last_loss": 2.0}, **changed,
    }  # fmt: skip


def with_random_weights(adapted: Any, size: float = 0.2) -> Any:
    """Every weight of an adapter is a number of its own, as after a training that changed them all."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
                weight.copy_(torch.randn_like(weight) * size)
    return adapted.eval()


def save_adapter(adapted: Any, base: Path, folder: Path, tokenizer: Any = None, **changed: Any) -> Any:
    """The output folder of a run that trained this adapter."""
    with warnings.catch_warnings():  # peft's word that it saves embeddings, too
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    update_run_json(folder, run_of(base, **changed))
    return read_result(folder)


def save_full(model: Any, base: Path, folder: Path, tokenizer: Any = None, **changed: Any) -> Any:
    """The output folder of a run that trained all parameters."""
    save_base(model, folder, tokenizer)
    update_run_json(folder, run_of(base, **changed))
    return read_result(folder)


def logits(model: Any, ids: tuple[int, ...] = (3, 77, 100, 4, 90, 2, 3, 110, 4)) -> torch.Tensor:
    """Of one row, in float32."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0].float()
