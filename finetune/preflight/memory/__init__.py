"""Memory and disk estimate of a run before it starts: per GPU, per host, on disk. Plain arithmetic.

model_spec        a model and a run as numbers: `spec_from_config` builds the first, `from_deepspeed` part of the other
device_memory     bytes of a GPU, phase by phase; for a rank on a CPU, its resident set
host_and_disk     host memory while loading, training and saving; checkpoints and the result
memory_estimate   all of it: `estimate_memory(model, run)`, and changes that make it fit: `suggest_changes`
"""

from finetune.preflight.memory.memory_estimate import MemoryEstimate, Suggestion, estimate_memory, suggest_changes
from finetune.preflight.memory.model_spec import (
    Activations,
    Block,
    ModelSpec,
    RunSpec,
    from_deepspeed,
    plain_activations,
)
