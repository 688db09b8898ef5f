"""Memory and disk estimate of a run before it starts: per GPU, per host, on disk. Plain arithmetic.

model_spec        a model (`ModelSpec`) and a run (`RunSpec`) as numbers; `spec_from_config` builds the first
device_memory     bytes of a GPU, phase by phase
cpu_memory        the same for a rank on a CPU, as its resident set
host_memory       host memory while loading, training and saving
disk_space        checkpoints and the result
deepspeed_sizes   `from_deepspeed(config)`: the fields of a `RunSpec` that a resolved DeepSpeed config decides
memory_estimate   all of it: `estimate_memory(model, run)`
suggestions       changes that make a run fit: `suggest_changes(model, run, bytes)`
"""

from finetune.preflight.memory.deepspeed_sizes import from_deepspeed
from finetune.preflight.memory.memory_estimate import MemoryEstimate, estimate_memory
from finetune.preflight.memory.model_spec import Activations, Block, ModelSpec, RunSpec, plain_activations
from finetune.preflight.memory.suggestions import Suggestion, suggest_changes
