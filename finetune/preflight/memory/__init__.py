"""Memory and disk estimate of a run, before it starts: per GPU, per host, on disk. Plain arithmetic.

model_spec        what is known of a model (`ModelSpec`) and of a run (`RunSpec`); `spec_from_config` builds the
                  first from a config
device_memory     the parts that a GPU holds, phase by phase
cpu_memory        the same for a rank on a CPU, as its resident set
host_memory       host memory while loading, training and saving
disk_space        checkpoints and the result
deepspeed_sizes   `from_deepspeed(config)`: the fields of a `RunSpec` that a resolved DeepSpeed config decides
memory_estimate   all of it: `estimate_memory(spec, run)`
suggestions       changes that make a run fit: `suggest_changes(spec, run, bytes)`
"""

from finetune.preflight.memory.cpu_memory import process_phases
from finetune.preflight.memory.deepspeed_sizes import from_deepspeed
from finetune.preflight.memory.device_memory import phases
from finetune.preflight.memory.memory_estimate import MemoryEstimate, estimate_memory
from finetune.preflight.memory.model_spec import (
    BYTES,
    Activations,
    Block,
    ModelSpec,
    OffloadDevice,
    Precision,
    RunSpec,
    plain_activations,
)
from finetune.preflight.memory.suggestions import Suggestion, suggest_changes

__all__ = [
    "BYTES",
    "Activations",
    "Block",
    "Suggestion",
    "MemoryEstimate",
    "RunSpec",
    "OffloadDevice",
    "Precision",
    "ModelSpec",
    "suggest_changes",
    "estimate_memory",
    "from_deepspeed",
    "phases",
    "plain_activations",
    "process_phases",
]
