"""What a rank would import and build before its first step, so that forked ranks find it done.

The server of `ranks` imports this module. What it holds is never collected: a collection in a rank would copy the
pages of every module.
"""

import gc
import importlib

from tests.helpers import environment  # noqa: F401, before torch

for name in (
    "deepspeed.comm.mori", "deepspeed.module_inject.auto_ep_layer", "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3", "deepspeed.runtime.zero.muon.muon_optimizer",
    "finetune.inference.load_result", "finetune.models.attention", "finetune.models.loss_head",
    "finetune.models.padding_free", "finetune.report.report_page", "finetune.train", "finetune.training.trainer",
    "ftfy", "networkx", "peft.tuners.lora.bnb", "peft.utils.transformers_weight_conversion", "plotext",
    "setuptools", "torch.utils.cpp_extension", "transformers.models.llama.modeling_llama",
):  # fmt: skip
    try:
        importlib.import_module(name)
    except ImportError as error:  # which the server would ignore, with all that follows here
        raise RuntimeError(f"{name} is not there to preload") from error

from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

from finetune.config.argument_parser import build_parser  # noqa: E402
from finetune.distributed.host_probe import versions  # noqa: E402

get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns, once
build_parser()  # reads the sources of libraries, once
versions()
gc.collect()
gc.freeze()
