"""Disks, memory of the host, files, checkpoints, the hub."""

from __future__ import annotations

from finetune.diagnostics.known import Known
from finetune.diagnostics.known.processes import CONTINUE, LESS_HOST_MEMORY

SHARED_MEMORY = "See `df -h /dev/shm`; in docker start with `--shm-size=16g` (or `--ipc=host`)"

FILES = (
    Known(
        "/dev/shm is full or too small",
        "Processes of a host exchange data through shared memory; containers get 64 MB of it.",
        f"{SHARED_MEMORY}, or load in the process itself: --dataloader_num_workers 0.",
        seen=r"insufficient shared memory|/dev/shm|shared memory segment"
        r"|unable to (mmap|open shared memory|allocate shared)"
        r"|DataLoader worker.*(bus error|SIGBUS)|shm_open",
    ),
    Known(
        "a process that loads data was killed",
        "Mostly because the host ran out of memory: each of these processes costs some.",
        f"Load in the process itself: --dataloader_num_workers 0. {LESS_HOST_MEMORY}",
        seen=r"DataLoader worker .*(killed by signal|exited unexpectedly)|pin memory thread exited",
    ),
    Known(
        "the disk quota is used up",
        "The disk has room, but your account or project may not have more of it.",
        "`quota -s` shows it. Remove old runs, keep fewer checkpoints (--save_total_limit 1), or take another disk "
        "for "
        "--output_dir.",
        seen=r"disk quota exceeded|\[Errno 122\]|EDQUOT",
    ),
    Known(
        "the disk is full",
        "A checkpoint with optimizer states takes 12 to 14 bytes per trained parameter, and the older one goes "
        "only when "
        "the new one is whole.",
        "Make room, or take another disk (--output_dir, --data_cache_dir); keep fewer checkpoints "
        "(--save_total_limit "
        "1) or smaller ones (--save_only_model True, --use_lora True).",
        seen=r"no space left on device|\[Errno 28\]|ENOSPC|was not saved in .*free|it needs about .* free",
    ),
    Known(
        "a file could not be written to its end",
        "torch and safetensors say no more than this when a disk is full, over quota or unreachable.",
        "Look at `df -h` and `quota -s` for --output_dir; keep fewer checkpoints with --save_total_limit 1.",
        seen=r"iostream error|unexpected pos \d+ vs|PytorchStreamWriter failed|inline_container\.cc.*(write|pos)",
    ),
    Known(
        "a file is larger than may be written",
        "A limit of the shell (`ulimit -f`) or of the file system (FAT, some mounts) stops large files.",
        "See `ulimit -f`, and take a file system without such a limit for --output_dir.",
        seen=r"file too large|\[Errno 27\]|EFBIG",
    ),
    Known(
        "the file system is mounted read-only",
        "Somebody mounted it so, or the kernel did after errors of the disk.",
        "Write elsewhere (--output_dir, --data_cache_dir). If it was writable before, `dmesg` tells what the disk did.",
        seen=r"read-only file system|\[Errno 30\]|EROFS",
    ),
    Known(
        "the network file system lost a file or its server",
        "The server was restarted, the mount went away, or another host removed a file that was open here.",
        f"See whether `ls` and `df` answer on that host, mount it anew. {CONTINUE}",
        seen=r"stale (nfs )?file handle|\[Errno 116\]|ESTALE|transport endpoint is not connected|\[Errno 107\]",
    ),
    Known(
        "the disk reports errors",
        "Reading or writing failed in the hardware, or in the network below the file system.",
        "`dmesg` on that host tells which disk. Take another one for --output_dir and --data_cache_dir.",
        seen=r"input/output error|\[Errno 5\]|remote I/O error|\[Errno 121\]",
    ),
    Known(
        "too many open files",
        "The limit of the shell is low, or there are many processes that load data.",
        "`ulimit -n 65536` before the start (on all hosts: in /etc/security/limits.conf), or fewer processes: "
        "--dataloader_num_workers 0.",
        seen=r"too many open files|\[Errno (24|23)\]|received 0 items of ancdata|EMFILE",
    ),
    Known(
        "no more processes or threads may be started",
        "A limit on processes of the user (`ulimit -u`) or of the container (`pids.max`) is reached.",
        "Raise `ulimit -u`, in docker `--pids-limit`; use fewer: OMP_NUM_THREADS=1, --preprocessing_num_workers 1, "
        "--dataloader_num_workers 0.",
        seen=r"can't start new thread|resource temporarily unavailable|pthread_create"
        r"|cannot allocate memory.*(fork|thread)"
        r"|(fork|thread).*cannot allocate memory",
    ),
    Known(
        "the host has no memory left",
        "A process asked for more than the host, its container, or `ulimit -v` allows.",
        LESS_HOST_MEMORY,
        seen=r"cannot allocate memory|\[Errno 12\]|DefaultCPUAllocator|^MemoryError|\bMemoryError\b|std::bad_alloc"
        r"|cudaHostAlloc|cudaErrorMemoryAllocation.*host",
    ),
    Known(
        "ssh does not accept the key",
        "ssh logs in without a password only where your key is known.",
        "Add your public key there (`ssh-copy-id HOST`), for every host of the hostfile and the launching one if "
        "it is "
        "listed, and try `ssh -o BatchMode=yes HOST hostname`.",
        seen=r"permission denied \((publickey|password|gssapi|keyboard)",
    ),
    Known(
        "no permission for a file",
        "It belongs to somebody else, e.g. to root after a run in a container.",
        "`ls -l` shows whose it is; name folders of your own (--output_dir, --data_cache_dir, HF_HOME) or change "
        "the owner.",
        seen=r"\[Errno 13\]|permission denied: ?'|PermissionError|operation not permitted|no permission to write",
    ),
    Known(
        "a checkpoint holds more than numbers",
        "torch loads no Python objects from files that it does not trust, and this file asks for some.",
        "Take a checkpoint that this project sealed, or weights as .safetensors. Do not load pickles from "
        "strangers: they "
        "run code.",
        seen=r"weights_only|WeightsUnpickler|UnpicklingError|unsupported global|upgrade torch to at least v2\.6",
    ),
    Known(
        "a weight file is damaged or not whole",
        "A download or copy was cut off, or git-lfs left a pointer of 130 bytes in its place.",
        "Compare sizes with the source; download it again (delete it from ~/.cache/huggingface first), or `git lfs "
        "pull`. "
        "A damaged checkpoint is set aside by --resume_from_checkpoint auto.",
        seen=r"SafetensorError|deserializing header|header too (small|large)|invalid ?header|MetadataIncompleteBuffer"
        r"|PytorchStreamReader failed|archive is corrupted|not a zip archive|unexpected EOF|consistency check failed",
    ),
    Known(
        "a checkpoint of another number of ranks",
        "ZeRO cuts optimizer states into one part per rank.",
        "Start on as many ranks as before, or add --resume_world_size any: the rows of a step stay the same.",
        seen=r"used a DP world size|world size of \d+ but the|different (dp|data parallel) (world )?size",
    ),
    Known(
        "what should be a checkpoint is none",
        "The folder lacks DeepSpeed's files: the save was not finished, or it holds weights only.",
        "--resume_from_checkpoint auto takes the newest whole one. From weights alone start a new run, with the "
        "folder as "
        "--model_name_or_path.",
        seen=r"can't find a valid checkpoint|trainer_state\.json"
        r"|zero_pp_rank.*(no such file|not found|does not exist)"
        r"|global_step\d+.*(no such file|not found|does not exist)",
    ),
    Known(
        "weights of another size",
        "Weights and model do not belong together: another base model, another --lora_r, or tokens added on one "
        "side only.",
        "Name the model that the weights were made from, with the same --lora_r and --new_tokens; or start anew in "
        "another "
        "--output_dir.",
        seen=r"size mismatch for|sizes? .{0,40}mismatch|shapes? .{0,40}(mismatch|do not match)|"
        r"size of tensor a \(\d+\) must match|mat1 and mat2 shapes cannot be multiplied",
    ),
    Known(
        "weights are missing or have other names",
        "The file is of another kind of model or adapter than the one that reads it.",
        "Name the base model in --model_name_or_path; a run with --use_lora True goes on only from checkpoints of "
        "such a "
        "run.",
        seen=r"missing key\(s\)|unexpected key\(s\)|error\(s\) in loading state_dict",
    ),
    Known(
        "saved weights are empty",
        "Under stage 3 each rank holds a part, and what is not gathered has no elements.",
        "In a config of your own set stage3_gather_16bit_weights_on_model_save to true; the shipped ones do "
        "(`--deepspeed zero3`).",
        seen=r"is empty, shape|shape \[0\]|torch\.Size\(\[0\]\)|everything is empty|holds no tensors",
    ),
    Known(
        "the adapter learned nothing",
        "No gradient reached it: a learning rate of 0, checkpointing that cuts the gradient off, or data without "
        "learned "
        "tokens.",
        "Look at the losses in metrics.jsonl; give --learning_rate a value such as 2e-4, or "
        "--gradient_checkpointing False.",
        seen=r"LoRA B matrices are still zero",
    ),
    Known(
        "the folder holds no weights",
        "--model_name_or_path names a folder without model files, e.g. a download that was cut off or the folder "
        "above.",
        "Look into it: there must be config.json and *.safetensors; download it again.",
        seen=r"no file named .*(safetensors|pytorch_model)"
        r"|does not appear to have a file named .*(safetensors|\.bin|config)",
    ),
    Known(
        "a Python file of the model is missing",
        "A model with code of its own needs its modeling_*.py beside the weights, or from the hub.",
        "Copy the .py files of the original repository into the folder; results of this project keep them.",
        seen=r"does not appear to have a file named .*\.py|No such file.*modeling_\w+\.py"
        r"|no module named.*transformers_modules",
    ),
    Known(
        "the hub wants to know who you are",
        "The model or data set is gated or private, and no token, or one without access, was sent.",
        "Ask for access on its page, then `huggingface-cli login` (or HF_TOKEN) on every host; or copy it and name "
        "the "
        "folder in --model_name_or_path.",
        seen=r"gated repo|is a gated|\b40[13] Client Error|\b(401|403)\b.*(unauthorized|forbidden)"
        r"|invalid (user )?token"
        r"|GatedRepoError|restricted and you are not",
    ),
    Known(
        "the hub asks you to wait",
        "Too many requests came from this address: each rank and host asks for each file.",
        "Wait some minutes; download once, copy it to the hosts, name the folder in --model_name_or_path and set "
        "HF_HUB_OFFLINE=1.",
        seen=r"\b429 client error|too many requests|rate limit",
    ),
    Known(
        "there is no such repository on the hub",
        "The name is misspelt, or it is private and you are not logged in.",
        "Compare --model_name_or_path and --data_path with the address of the page (owner/name); a folder is named "
        "by its "
        "path.",
        seen=r"RepositoryNotFound|\b404 Client Error|repository not found"
        r"|is not a local folder and is not a valid model",
    ),
    Known(
        "the hub cannot be reached",
        "This host has no way to the internet, or goes through a proxy that does not let it pass.",
        "Download it where there is one, copy it, name the folder in --model_name_or_path and set HF_HUB_OFFLINE=1; "
        "HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy.",
        seen=r"couldn't connect to|offline mode|LocalEntryNotFound|HTTPSConnectionPool|CERTIFICATE_VERIFY|"
        r"huggingface\.co.*(resolution|timed out|max retries|refused|reset)|ReadTimeout|ConnectTimeout"
        r"|OfflineModeIsEnabled",
    ),
    Known(
        "the model brings code that is not trusted",
        "It needs Python files from its repository, and nobody has said that they may run.",
        "Read them, then add --trust_remote_code True.",
        seen=r"trust_remote_code|contains custom code|requires you to execute",
    ),
    Known(
        "columns of the data have mixed types",
        "Arrow wants one type per column, and a field is a list in one row and text or a number in another.",
        "`finetune convert IN OUT` writes rows as this project reads them and names the rows that do not fit.",
        seen=r"ArrowInvalid|ArrowTypeError|cannot mix (list|struct)|changed from .* to (number|string|array|object)"
        r"|DatasetGenerationError",
    ),
)
