"""How much memory a run takes, before it starts: on each GPU, on each host, on the disk; plain arithmetic.

shape      what is known of a model (`Shape`) and of a run (`Job`); `finetune.shapes` makes the first from a config
device     the parts that a GPU holds, phase by phase
process    the same for a rank whose device is the CPU, as its resident set
host, disk host memory while loading, training and saving; checkpoints and the result
configs    from_deepspeed(config) -> what a Job takes from a resolved DeepSpeed config
estimate   all of it: estimate(shape, job) -> Estimate
changes    what to change where it does not fit: changes_that_fit(shape, job, bytes) -> up to three
"""

from finetune.memory.changes import Change, changes_that_fit
from finetune.memory.configs import from_deepspeed
from finetune.memory.device import phases
from finetune.memory.estimate import Estimate, estimate
from finetune.memory.process import process_phases
from finetune.memory.shape import BYTES, Activations, Block, Job, Place, Precision, Shape, plain_activations

__all__ = [
    "BYTES",
    "Activations",
    "Block",
    "Change",
    "Estimate",
    "Job",
    "Place",
    "Precision",
    "Shape",
    "changes_that_fit",
    "estimate",
    "from_deepspeed",
    "phases",
    "plain_activations",
    "process_phases",
]
