"""Tiny random checkpoints of models that read images, too; training sees their text alone."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.helpers import tiny_models

TEXT = {**tiny_models.SIZES, **tiny_models.GROUPED, "head_dim": 8}
VIT = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
           patch_size=8)  # fmt: skip
QWEN_VIT = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, patch_size=8, out_hidden_size=32,
                num_position_embeddings=16, deepstack_visual_indexes=[0])  # fmt: skip
IMAGE = dict(image_token_id=190, video_token_id=191, vision_start_token_id=192, vision_end_token_id=193)
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
MARKS = dict(boi_token_index=191, eoi_token_index=192, image_token_index=190)
# family -> (prefix of its classes, fields of the text model besides TEXT, fields of the vision tower, other fields)
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen3_5": ("Qwen3_5", tiny_models.LINEAR, QWEN_VIT, IMAGE),
    "qwen3_vl": ("Qwen3VL", {"rope_parameters": MROPE}, QWEN_VIT, IMAGE),
    "qwen3_vl_moe": ("Qwen3VLMoe", {"rope_parameters": MROPE, **tiny_models.ROUTED}, QWEN_VIT, IMAGE),
    "gemma3": ("Gemma3", tiny_models.MIXED, VIT, {**MARKS, "mm_tokens_per_image": 4}),
    "gemma4": (
        "Gemma4",
        {**tiny_models.FAMILIES["gemma4"][1], "head_dim": 8},
        {**VIT, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16, "pooling_kernel_size": 2},
        {"audio_config": None, "image_token_id": 190, "boi_token_id": 191, "eoi_token_id": 192, "audio_token_id": 193,
         "boa_token_id": 194, "video_token_id": 195},
    ),
    "mistral3": (
        "Mistral3", {"model_type": "mistral"}, {**VIT, "model_type": "pixtral", "head_dim": 8},
        {"image_token_index": 190},
    ),
    "llama4": (
        "Llama4",
        dict(num_local_experts=2, intermediate_size_mlp=48, num_experts_per_tok=1, attn_temperature_tuning=False),
        {**VIT, "intermediate_size": 32, "projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16,
         "pixel_shuffle_ratio": 1.0},
        MARKS,
    ),
}  # fmt: skip


def save(family: str, folder: Path, **text: Any) -> Path:
    """Save a model in bf16, as it is published.

    That of Qwen3.5 has a head for multi-token prediction, which transformers does not load; the experts of Qwen3-VL-MoE
    are transposed, which transformers also reads as they are in memory, and writes so.
    """
    prefix, own, vision, others = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(
        text_config={**TEXT, **own, **text}, vision_config=vision, **others
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    with warnings.catch_warnings():  # a rotation of complex numbers, which is not saved
        warnings.simplefilter("ignore")
        model.to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if family == "qwen3_5":
        tensors["mtp.fc.weight"] = torch.randn(32, 64, dtype=torch.bfloat16)
    if family == "qwen3_vl_moe":
        tensors |= {name: weight.mT.contiguous() for name, weight in tensors.items() if "experts." in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
