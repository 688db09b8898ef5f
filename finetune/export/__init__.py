"""Export a result: merge an adapter or a checkpoint into a plain model, write GGUF, verify what was saved."""

from __future__ import annotations

from finetune.export.gguf_writer import check_gguf, write_gguf
from finetune.export.model_merge import MergePlan, MergeResult, merge_weights, plan_merge
