"""A result becomes a plain model: an adapter goes into its base, a checkpoint leaves its parts behind.

stored    the tensors of a model's folder, one at a time
names     how files and a model in memory call the same weight
pieces    what the merged model is made of: each tensor, and how to get it
shards    pieces to files of a size, an index beside them
proof     the merged model, opened again, against what was trained
folder    config, tokenizer, code, card: everything beside the weights
ggufs     the same model as a file of llama.cpp's
"""

from __future__ import annotations

from finetune.export.gguf_writer import check_gguf, write_gguf
from finetune.export.merge_weights import MergePlan, MergeResult, merge_weights, plan_merge

__all__ = ["MergeResult", "MergePlan", "check_gguf", "merge_weights", "plan_merge", "write_gguf"]
