"""Processes that died, stopped or never came."""

from __future__ import annotations

from finetune.diagnostics.known import Known

LESS_HOST_MEMORY = (
    "Fewer ranks on this host (--num_gpus, slots= in the hostfile), `--deepspeed zero3` without offload, or more "
    "memory: the limit of a container or job counts (`memory.max`, `--mem`)."
)
CONTINUE = "Start the same command with --resume_from_checkpoint auto: it goes on from the newest whole checkpoint."

# A counter that still is at 0 says nothing.
KERNEL_KILLED = r"oom[_-]kill(?!:? 0$)|out of memory: killed process"

# Told by what was seen beside the failure, whatever else it says.
OBSERVED = (
    Known(
        "the launcher is gone",
        "The `deepspeed` command, or what it started on the host, has ended while its ranks still ran: killed for "
        "memory, by a scheduler, with its terminal, or by a person; the ranks end with it.",
        f"`dmesg` on that host or the scheduler's log tells by whom. {CONTINUE}",
        seen=r"has died, and its ranks|although deepspeed says",
        kinds=("launcher",),
    ),
    Known(
        "the host ran out of memory while the model was loaded",
        "The kernel killed the process. While weights are read each rank of a host holds a part of them or, below "
        "stage 3, all of them.",
        f"Load with `--deepspeed zero3`, which splits the weights as they are read. {LESS_HOST_MEMORY}",
        seen=KERNEL_KILLED,
        phases=("model",),
    ),
    Known(
        "the host ran out of memory in a save",
        "The kernel killed the process. While weights are gathered under stage 3, the first host holds the whole "
        "model in its memory.",
        f"{LESS_HOST_MEMORY} {CONTINUE}",
        seen=KERNEL_KILLED,
        phases=("save",),
    ),
    Known(
        "the host ran out of memory",
        "The kernel killed the process: what all processes of the host, or of its container, hold was more than "
        "there "
        "is.",
        LESS_HOST_MEMORY,
        seen=KERNEL_KILLED,
    ),
    Known(
        "a process is stopped",
        "The rank was halted from outside (SIGSTOP, Ctrl-Z, a debugger) and the others wait for it.",
        "Find out who stops processes on that host (a debugger, a scheduler that suspends jobs); `kill -CONT PID` "
        f"wakes one up. {CONTINUE}",
        seen=r"\bstate:?\s*T\b|\(stopped\)|\(tracing stop\)",
        kinds=("stuck",),
    ),
    Known(
        "a save waits for the disk",
        "The process sleeps inside the kernel until the file system answers: a network file system that hangs, or a "
        "disk that is overloaded.",
        "Look at the file system of --output_dir on that host (`df`, `dmesg`: does it answer?), or write to another "
        f"disk. {CONTINUE}",
        seen=r"\bstate:?\s*D\b|\(disk sleep\)|\bnfs_|rpc_wait|lustre",
        kinds=("stuck",),
        phases=("save", "end"),
    ),
    Known(
        "reading waits for the disk",
        "The process sleeps inside the kernel until the file system answers: a network file system (NFS, Lustre) "
        "that "
        "hangs, or a disk that is overloaded.",
        "See whether the data, the model and the cache can be read on that host (`ls`, `df`, `dmesg`); keep prepared "
        "data on a local disk with --data_cache_dir.",
        seen=r"\bstate:?\s*D\b|\(disk sleep\)|\bnfs_|rpc_wait|lustre",
        kinds=("stuck",),
    ),
    Known(
        "the build of an operator waits for another one",
        "torch waits for a file `lock` that another build holds, or has left behind.",
        "See whether a compiler runs on that host; where none does, remove the files named `lock` below the folder "
        "of "
        "TORCH_EXTENSIONS_DIR (by default torch_extensions/ in the virtual environment) and start again.",
        stack=r"file_baton\.py|_jit_compile|cpp_extension\.py",
        kinds=("stuck",),
    ),
)

# What is left when the failure says nothing that is known.
BARE = (
    Known(
        "probably the host ran out of memory while the model was loaded",
        "SIGKILL comes from the kernel when memory is short, or from a scheduler or a person.",
        '`dmesg` on that host tells ("Killed process"). Load with `--deepspeed zero3`, which splits the weights as '
        f"they are read. {LESS_HOST_MEMORY}",
        kinds=("died",),
        signals=(9,),
        phases=("model",),
    ),
    Known(
        "killed from outside, often because the host ran out of memory",
        "SIGKILL comes from the kernel when memory is short, from a scheduler when time is up, or from a person.",
        f'`dmesg` on that host tells ("Killed process"), or the scheduler\'s log. {LESS_HOST_MEMORY}',
        kinds=("died",),
        signals=(9,),
    ),
    Known(
        "the launcher was killed",
        "The `deepspeed` command, or what it started on the host, was ended from outside (memory, a scheduler, a "
        "closed terminal); the ranks end with it.",
        f"`dmesg` on that host or the scheduler's log tells by whom. {CONTINUE}",
        kinds=("launcher",),
        signals=(1, 2, 6, 9, 11, 15),
    ),
    Known(
        "ended by whoever started it",
        "SIGTERM is what schedulers send when the time is up or the place is needed, SIGINT is Ctrl-C, SIGHUP a "
        "terminal that closed.",
        f"{CONTINUE} In a terminal that may close, start it under `nohup` or `tmux`.",
        kinds=("died", "stopped"),
        signals=(1, 2, 15),
    ),
    Known(
        "the run was asked to stop",
        "Somebody, or the scheduler, asked for it; nothing is wrong with the run.",
        CONTINUE,
        kinds=("stopped",),
    ),
    Known(
        "the processor does not know an instruction",
        "SIGILL: something was compiled on a newer processor than this host has.",
        "Remove the compiled operators on a shared disk (the folder of TORCH_EXTENSIONS_DIR, by default "
        "torch_extensions/ in the virtual environment), or give each kind of host a folder of its own there.",
        signals=(4,),
    ),
    Known(
        "memory behind a file was lost",
        "SIGBUS: /dev/shm is full, or a file that is mapped into memory was cut short or lies on a disk that fails.",
        "See `df -h /dev/shm` (in docker, start with `--shm-size=16g`) and the disk of the data cache; a damaged "
        "cache "
        "below --data_cache_dir may be deleted at any time.",
        signals=(7,),
    ),
    Known(
        "a crash inside compiled code",
        "SIGSEGV: mostly libraries that do not belong together (torch, CUDA, flash-attn, NCCL), seldom memory that "
        "is "
        "broken.",
        "Install the tested set (`pip install -r requirements.txt`) in a new environment and delete compiled "
        "operators (TORCH_EXTENSIONS_DIR); if it is always the same host, test its memory and GPU.",
        signals=(11,),
    ),
    Known(
        "a library gave up",
        "SIGABRT or SIGFPE: compiled code met what it does not expect and ended the process; NCCL's watchdog does "
        "so, "
        "too.",
        "The reason is in the lines that this rank wrote before, mostly the last ones.",
        signals=(6, 8),
    ),
    Known(
        "a process ended too early",
        "It says that all went well, but the others still had work to do: something in it called exit.",
        "Look at the last lines that this rank wrote; code that comes with a model (--trust_remote_code) may do this.",
        kinds=("died",),
        seen=r"status 0\b",
    ),
    Known(
        "some ranks never arrived",
        "Their hosts did not start them, they died before they could say why, or the network does not let them reach "
        "the first host.",
        "Type the same command with `finetune doctor` in place of `deepspeed finetune/finetune.py`: it asks every "
        "host, tries the way to the first one, and lets all ranks meet. Then open the port (--master_port), give "
        "--master_addr an address that all hosts reach, or name the interface (--write_env).",
        kinds=("missing",),
    ),
    Known(
        "a host was lost",
        "Its connection ended: the machine went down or was restarted, or the network between the hosts broke.",
        f"See whether the host answers and what its log says. Without it: --exclude HOST. {CONTINUE} On another "
        "number "
        "of ranks add --resume_world_size any.",
        kinds=("lost",),
    ),
    Known(
        "preparing data took longer than a rank may wait",
        "One process of each cache folder prepares the data while the others wait.",
        "Raise --ddp_timeout (seconds), give it more processes (--preprocessing_num_workers), or run `finetune "
        "preview` "
        "on a few rows first to see how long a row takes.",
        kinds=("stuck",),
        phases=("data",),
    ),
    Known(
        "a rank waits at the meeting for others",
        "A rank waits for others that are not there, or that it cannot reach: another network interface, a firewall.",
        "Give --master_addr an address that all hosts reach. Name the interface in `.deepspeed_env`: "
        "GLOO_SOCKET_IFNAME=eth0 and NCCL_SOCKET_IFNAME=eth0 (hostfiles/README.md).",
        kinds=("stuck",),
        phases=("meeting",),
    ),
    Known(
        "loading the model takes too long",
        "All ranks read the weights at once, from a slow or a network disk, or from the hub.",
        "Copy the model to a local disk of each host and name that folder in --model_name_or_path.",
        kinds=("stuck",),
        phases=("model",),
    ),
    Known(
        "a save does not end",
        "The disk is slow or does not answer, or one rank did not come to the save and the others wait.",
        "Look at the disk of --output_dir; write to a faster one, or save less: --save_only_model True, a larger "
        f"--save_steps. {CONTINUE}",
        kinds=("stuck",),
        phases=("save", "end"),
    ),
    Known(
        "one rank is behind and the others wait for it",
        "A GPU or a network link that hangs, a host that is overloaded, or a first step that still compiles.",
        "The rank whose stack is not inside a collective is the one to look at: `nvidia-smi` and `dmesg` (Xid) on "
        "its "
        f"host; leave a bad host out with --exclude. {CONTINUE}",
        kinds=("stuck",),
    ),
    Known(
        "killed from outside, or crashed in compiled code",
        "A process that can still speak says why it ends; this one could not.",
        f"A crash prints the stack in front of this page; for a kill see `dmesg` on that host, or the scheduler's "
        f"log. {CONTINUE}",
        kinds=("died",),
    ),
)
