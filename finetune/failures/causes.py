"""Known causes, from the special to the general: the first that fits is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune.failures.record import Failure


@dataclass(frozen=True)
class Cause:
    """A known one: what it is, and what to do."""

    title: str
    do: str


def _says(pattern: str) -> Callable[[Failure], bool]:
    compiled = re.compile(pattern, re.IGNORECASE | re.DOTALL)
    return lambda failure: bool(compiled.search(f"{failure.error}\n{failure.traceback or ''}"))


def _is(**wanted: Any) -> Callable[[Failure], bool]:
    return lambda failure: all(getattr(failure, name) == value for name, value in wanted.items())


def _is_saying(kind: str, pattern: str) -> Callable[[Failure], bool]:
    says = _says(pattern)
    return lambda failure: failure.kind == kind and says(failure)


LESS_MEMORY = (
    "lower --per_device_train_batch_size (and raise --gradient_accumulation_steps alike), bound batches with "
    "--tokens_per_device_batch, give --gradient_checkpointing True, a higher ZeRO stage or an offload config "
    "(ds_configs/README.md), or --use_lora True"
)
NETWORK = (
    "name the interface that joins the hosts in .deepspeed_env (NCCL_SOCKET_IFNAME=eth0, GLOO_SOCKET_IFNAME=eth0), and "
    "look for a firewall between them"
)
CAUSES: tuple[tuple[Callable[[Failure], bool], Cause], ...] = (
    # how a process or a host ended
    (_is_saying("died", r"oom_kill"),
     Cause("the host ran out of memory, and the kernel ended a process",
           "use fewer ranks a host, --use_lora True, ZeRO-3 instead of an offload config, fewer "
           "--dataloader_num_workers; `dmesg -T | grep -i kill` names the process")),
    (_is_saying("stuck", r"SIGSTOP"),
     Cause("somebody stopped the process (Ctrl-Z, kill -STOP, a debugger)", "start the run again")),
    (_is(kind="stuck", phase="save"),
     Cause("the file system of --output_dir does not answer",
           "try `df` and `touch` there on that host; --save_timeout is the limit")),
    (_is(kind="stuck", phase="model"),
     Cause("the model is not read: a slow or silent file system or hub",
           "copy the model to a local disk; --start_timeout is the limit")),
    (_is(kind="stuck"),
     Cause("ranks wait for one that does not come: a device or network that hangs, or a disk",
           "look at the stacks above: the rank that is not in a collective is the one; then at nvidia-smi and dmesg on "
           "its host; --step_timeout is the limit")),
    (_is(kind="missing"),
     Cause("hosts that were not started, start later than the others, or cannot reach the first one",
           "start with `finetune launch` in place of `deepspeed`: it asks every host first; give --master_addr, the "
           "first host's address in the network of the others; --meeting_timeout is the limit")),
    (_is(kind="lost"),
     Cause("the host went down, or the network to it", "look whether it answers (ssh), then start the run again")),
    (_is(kind="launcher"),
     Cause("the launcher was killed: by a user, a scheduler, or for lack of memory",
           "look into the scheduler's log and `dmesg -T | grep -i kill`, then start the run again")),
    # devices and memory
    (_says(r"CUDA out of memory|OutOfMemoryError|HIP out of memory|CUBLAS_STATUS_ALLOC_FAILED"),
     Cause("the GPU's memory is full", LESS_MEMORY)),
    (_says(r"Cannot allocate memory|DefaultCPUAllocator: can.t allocate|MemoryError|std::bad_alloc"),
     Cause("the host's memory is full", LESS_MEMORY)),
    (_says(r"device-side assert"),
     Cause("an index out of range on the GPU, often a token id beyond the embeddings",
           "run once with CUDA_LAUNCH_BLOCKING=1, or on a CPU with --use_cpu True: the error then names the line")),
    (_says(r"uncorrectable ECC|Xid|GPU has fallen off the bus|unspecified launch failure"),
     Cause("the GPU itself is broken", "leave the host out (--exclude), have it looked at, and go on")),
    (_says(r"illegal memory access|misaligned address"),
     Cause("a kernel wrote where it must not: a library, or a broken GPU",
           "update flash-attn or leave it out (--attn_implementation sdpa); try another GPU (--exclude)")),
    (_says(r"no kernel image is available|CUDA driver version is insufficient|forward compatibility"),
     Cause("torch was built for other GPUs or a newer driver", "install the torch build of this driver and GPU")),
    (_says(r"bus error|/dev/shm|shared memory \(shm\)"),
     Cause("/dev/shm is full", "give the container more (--shm-size=16g), or use --dataloader_num_workers 0")),
    # network
    (_says(r"address already in use|EADDRINUSE"),
     Cause("another run holds the port on which the ranks meet",
           "use `finetune launch`, which finds a free one, or give --master_port")),
    (_says(r"watchdog.*timeout|collective operation timeout|NCCL.*timed? ?out"),
     Cause("NCCL waited too long for a rank",
           "look for the first rank that failed or hangs; --ddp_timeout is the limit")),
    (_says(r"connectFullMesh|Gloo.*127\.0\.0\.1|unable to (find|resolve) (interface|address)"),
     Cause("gloo told the others an address at which they cannot reach it", NETWORK)),
    (_says(r"ncclSystemError|ncclInternalError|ncclRemoteError|unhandled (system|cuda) error|NCCL error"),
     Cause("NCCL could not use the network or a device", f"run once with NCCL_DEBUG=WARN; {NETWORK}")),
    (_says(r"Permission denied \(publickey|Host key verification failed"),
     Cause("ssh does not let the launching machine in", "make `ssh -o BatchMode=yes HOST true` work for every host")),
    (_says(r"timed out.*(store|rendezvous|clients joined)|(store|rendezvous).*timed out|clients joined"),
     Cause("some ranks did not arrive where all meet", NETWORK + "; give --master_addr")),
    (_says(r"connection (closed|reset)|broken pipe|socket ?timeout"),
     Cause("another rank or its host went away", "look for what that rank said")),
    # disks and limits
    (_says(r"No space left on device|Disk quota exceeded|Errno 28|Errno 122"),
     Cause("the disk is full", "make room, lower --save_total_limit, or choose another --output_dir")),
    (_says(r"too many open files"),
     Cause("the limit of open files is too low", "raise it (`ulimit -n 65536`) or lower --dataloader_num_workers")),
    (_says(r"can.t start new thread|Resource temporarily unavailable"),
     Cause("the limit of processes and threads is reached", "raise it (`ulimit -u`) or set OMP_NUM_THREADS=1")),
    (_says(r"Read-only file system|Stale file handle|Input/output error"),
     Cause("a file system failed", "look at the disk or the network file system of that host")),
    # building and libraries
    (_says(r"ds_opt_adam|Unable to JIT load|Error building extension|CUDA_HOME|ninja.*(required|not found)"),
     Cause("DeepSpeed could not compile an operator",
           "install a C++ compiler and, for GPUs, the CUDA toolkit of torch's version with CUDA_HOME set; the "
           "compiler's own message stands further up")),
    (_says(r"GLIBCXX|GLIBC_\d|undefined symbol"),
     Cause("a library was built for another torch or system", "install it again in this environment (flash-attn: "
           "pip install --no-build-isolation --force-reinstall flash-attn)")),
    (_says(r"No module named 'flash_attn|FlashAttention2 has been toggled on"),
     Cause("flash-attn is not installed", "leave out --attn_implementation, or install it")),
    (_says(r"unexpected keyword argument '(tokenizer|evaluation_strategy|overwrite_output_dir|warmup_ratio)'"),
     Cause("another transformers than this project was tested with", "pip install -r requirements.txt")),
    # numbers and shapes
    (_is(status=5), Cause("the numbers are no longer finite",
        "lower --learning_rate, warm up longer (--warmup_steps), look at the rows named, leave them out")),
    (_says(r"loss scale already at minimum"),
     Cause("fp16 cannot hold the gradients", "use --bf16 True where the GPU has it, or lower --learning_rate")),
    (_says(r"does not require grad"),
     Cause("nothing that is trained takes part in the loss", "give --gradient_checkpointing False once to find out")),
    (_says(r"CheckpointError|recomputed (values|tensors)|different metadata"),
     Cause("a layer computed something else when its activations were made again",
           "give --gradient_checkpointing False, or --gradient_checkpointing_kwargs '{\"use_reentrant\": true}'")),
    (_says(r"train_batch_size is not equal"),
     Cause("batch sizes in the DeepSpeed config contradict the flags", 'write "auto" for them')),
    (_says(r"size mismatch for|Missing key\(s\) in state_dict|shape mismatch"),
     Cause("saved weights are of another model or adapter", "look whether --model_name_or_path is what was trained")),
    (_says(r"UnpicklingError|weights_only"),
     Cause("a checkpoint holds more than tensors", "make it again with this project: it loads nothing else")),
    (_says(r"HeaderTooLarge|InvalidHeaderDeserialization|SafetensorError|MetadataIncompleteBuffer"),
     Cause("a weights file is cut or damaged", "copy or download the model again (git-lfs files may be pointers)")),
    # hubs
    (_says(r"401 Client Error|403 Client Error|GatedRepo|gated repo"),
     Cause("the hub does not give the model to this account", "accept its terms there, and set HF_TOKEN")),
    (_says(r"429 Client Error|Too Many Requests"),
     Cause("the hub is asked too often", "load the model once, then set HF_HUB_OFFLINE=1")),
    (_says(r"ConnectionError.*huggingface|couldn.t connect to|LocalEntryNotFound|OfflineModeIsEnabled"),
     Cause("the hub cannot be reached", "copy the model to a folder, or name a mirror in HF_ENDPOINT")),
    (_is(kind="died"),
     Cause("killed from outside, or crashed in native code",
           "look at `dmesg -T` and the scheduler's log on that host")),
)  # fmt: skip


def likely_cause(failure: Failure) -> Cause | None:
    """The first known cause that fits, None where none does."""
    return next((cause for fits, cause in CAUSES if fits(failure)), None)
