"""Environment variables of the ranks: which are exported to every host, `.deepspeed_env`, which hold secrets.

    # comment
    NCCL_SOCKET_IFNAME=eth0
    export HF_HOME="/shared/hub cache"

The launcher splits each line of `.deepspeed_env` at its first `=` and inserts both parts in a remote shell command
(`add_export` in deepspeed/launcher/multinode_runner.py, 0.19.8). Here a line is a name and a value, and nothing in it
is executed. No log may show the value of a name that stands for a secret.
"""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from finetune.launcher.hostfile import decode_line, read_small_file
from finetune.utils.atomic_io import replacing
from finetune.utils.errors import ConfigError, raise_faults

HIDDEN = "***"

# Variables that mean the same on every host of a job. Not among them: what the launcher sets for each rank (RANK,
# MASTER_*, CUDA_VISIBLE_DEVICES), and what differs between hosts (PATH, HOME, TMPDIR, proxies).
EXPORTED = frozenset(
    # where models and data are, and whether the network may be used: huggingface_hub, datasets, transformers
    "HF_HOME HF_HUB_CACHE HF_ASSETS_CACHE HF_XET_CACHE HF_DATASETS_CACHE HF_MODULES_CACHE XDG_CACHE_HOME "
    "HF_ENDPOINT HF_TOKEN HF_TOKEN_PATH HUGGING_FACE_HUB_TOKEN HF_HUB_OFFLINE HF_DATASETS_OFFLINE TRANSFORMERS_OFFLINE "
    "HF_HUB_DISABLE_XET HF_HUB_DISABLE_TELEMETRY HF_HUB_DISABLE_PROGRESS_BARS HF_HUB_DISABLE_IMPLICIT_TOKEN "
    "HF_HUB_DOWNLOAD_TIMEOUT HF_HUB_ETAG_TIMEOUT MODELSCOPE_CACHE MODELSCOPE_API_TOKEN "
    # Python: the launcher sends all that begins with PYTHON
    "PYTHONPATH PYTHONHOME PYTHONHASHSEED PYTHONUNBUFFERED PYTHONWARNINGS PYTHONFAULTHANDLER PYTHONUTF8 "
    "PYTHONNOUSERSITE PYTHONDONTWRITEBYTECODE "
    # compilers and compiled operators
    "LD_LIBRARY_PATH CUDA_HOME CUDA_PATH CC CXX MAX_JOBS TORCH_CUDA_ARCH_LIST TORCH_EXTENSIONS_DIR TRITON_CACHE_DIR "
    "TORCHINDUCTOR_CACHE_DIR "
    # how ranks compute
    "OMP_NUM_THREADS MKL_NUM_THREADS TOKENIZERS_PARALLELISM CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING "
    "CUBLAS_WORKSPACE_CONFIG NVIDIA_TF32_OVERRIDE PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF "
    "FLASH_ATTENTION_DETERMINISTIC "
    # DeepSpeed and torch.distributed
    "DS_ACCELERATOR DS_SKIP_CUDA_CHECK DS_IGNORE_CUDA_DETECTION DEEPSPEED_TIMEOUT TORCH_DISTRIBUTED_DEBUG "
    "TORCH_CPP_LOG_LEVEL TORCH_SHOW_CPP_STACKTRACES "
    # verbosity
    "TRANSFORMERS_VERBOSITY DATASETS_VERBOSITY DS_LOG_LEVEL NO_COLOR "
    # where results are reported
    "WANDB_API_KEY WANDB_BASE_URL WANDB_ENTITY WANDB_PROJECT WANDB_NAME WANDB_NOTES WANDB_TAGS WANDB_RUN_ID "
    "WANDB_RUN_GROUP WANDB_RESUME WANDB_MODE WANDB_DIR WANDB_DISABLED WANDB_SILENT WANDB_LOG_MODEL WANDB_WATCH "
    "MLFLOW_TRACKING_URI MLFLOW_TRACKING_TOKEN MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD MLFLOW_RUN_ID "
    "MLFLOW_EXPERIMENT_NAME MLFLOW_TAGS MLFLOW_NESTED_RUN MLFLOW_FLATTEN_PARAMS MLFLOW_MAX_LOG_PARAMS "
    "HF_MLFLOW_LOG_ARTIFACTS TENSORBOARD_LOGGING_DIR".split()
)
# Communication libraries have hundreds of settings, which all ranks of a job must share.
EXPORTED_PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "FI_", "RDMAV_", "IBV_", "SHARP_", "RCCL_", "HSA_")
HOST_SPECIFIC = frozenset({"NCCL_HOSTID"})

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET = re.compile(r".*(secret|password|passwd|passphrase|credential|apikey|accesskey|privatekey)s?|bearer|sshpass")
_JOINED = re.compile(r".+token")
# Words before and after "token" and "key" that make them a token of text or the key of a table.
_TOKEN_BEFORE = set("pad eos bos unk sep cls mask special image per next start end stop".split())
_TOKEN_AFTER = set("id ids index indices type types count limit budget length embedding dropout level".split())
_KEY_BEFORE = set("sort primary group foreign public cache dict json metric column row".split())
_KEY_AFTER = set("value padding prefix name names column type mask length dim heads bits error".split())
_PLURAL_BEFORE = set("api access auth private secret ssh signing encryption refresh bearer".split())

# A value as a shell reads it: quoted parts, escapes, plain characters; an open quote hides all that follows.
_VALUE = re.compile(r"""(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"\\;]|['"\\][\s\S]*)+""")
_NAME_IN_TEXT = re.compile(r"(?<![\w-])(?:([A-Za-z_]\w*)=|(--?[A-Za-z][\w-]*)(?:[ \t]+|=))")
_PAIR_OF_JSON = re.compile(r'"([^"\\]+)"(\s*:\s*)("(?:\\.|[^"\\])*")')
_USER_OF_URL = re.compile(r"(?<=://)[^/\s@'\"]*(?=@)")
ENVIRONMENT_FILE = ".deepspeed_env"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_EXPORT = re.compile(r"export[ \t]+")
SHOWN_OF_NAME, SHOWN_OF_LINE = 8, 4  # characters; the text before a missing "=" may be a password


def is_exported(name: str) -> bool:
    """Whether a variable of this machine is set on the other hosts without being named in `.deepspeed_env`."""
    return name in EXPORTED or (name.startswith(EXPORTED_PREFIXES) and name not in HOST_SPECIFIC)


def is_secret(name: str) -> bool:
    """Whether a variable or flag of this name holds a secret.

    HF_TOKEN, hub-token, AWS_SECRET_ACCESS_KEY, PGPASSWORD and apiKey do; human_token_ids, new_tokens, eos_token,
    TOKENIZERS_PARALLELISM and keys do not.
    """
    words = [word.lower() for word in _WORDS.findall(name)]
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        if _SECRET.fullmatch(word) or _JOINED.fullmatch(word):
            return True
        if word == "token" and before not in _TOKEN_BEFORE and after not in _TOKEN_AFTER:
            return True
        if word == "key" and before not in _KEY_BEFORE and after not in _KEY_AFTER:
            return True
        if word in ("tokens", "keys") and before in _PLURAL_BEFORE:
            return True
        if word in ("pwd", "pass") and before and not after:
            return True
    return False


def redact(words: Sequence[str]) -> list[str]:
    """Replace the values of secret flags and variables in a command line by `***`, so that it can be logged.

    >>> redact(["HF_TOKEN=hf_abc", "train.py", "--hub_token", "hf_abc", "--max_new_tokens", "5"])
    ['HF_TOKEN=***', 'train.py', '--hub_token', '***', '--max_new_tokens', '5']

    Words that are shell commands, URLs with a user, or JSON are searched, too.
    """
    redacted = []
    hiding, follows_secret = False, False  # a secret flag's values end at the next flag; the first may begin with -
    for word in words:
        name, equals, _ = word.partition("=")
        is_flag = bool(re.fullmatch(r"--?[A-Za-z][\w.-]*", name)) and not (follows_secret and not word.startswith("--"))
        follows_secret = is_flag and not equals and is_secret(name)
        hiding = follows_secret or (hiding and not is_flag)
        if hiding and not is_flag:
            redacted.append(HIDDEN)
        elif equals and (is_flag or re.fullmatch(r"\w+", name)) and is_secret(name):
            redacted.append(f"{name}={HIDDEN}")
        else:
            redacted.append(_redacted_text(word))
    return redacted


def _redacted_text(text: str) -> str:
    parts, position = [], 0
    # Names inside the values of others are found, too: a quoted word may be a command.
    for match in _NAME_IN_TEXT.finditer(text):
        if match.start() >= position and is_secret(match[1] or match[2]):
            value = _VALUE.match(text, match.end())
            parts += [text[position : match.end()], HIDDEN if value else ""]
            position = value.end() if value else match.end()
    text = "".join([*parts, text[position:]])
    text = _PAIR_OF_JSON.sub(lambda pair: f'"{pair[1]}"{pair[2]}"{HIDDEN}"' if is_secret(pair[1]) else pair[0], text)
    return _USER_OF_URL.sub(HIDDEN, text)


def read_environment_file(path: str | PathLike[str]) -> dict[str, str]:
    """Return name -> value, in the order of the file; the last line of a name counts.

    Quotes around a whole value and blanks at its end are removed; everything else is kept literally. A file that others
    can write, or of another user, is an error. No error shows a value.
    """
    path = Path(path)
    lines, status = read_small_file(path, "environment file")
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"{path} belongs to user {status.st_uid}, not to you ({os.geteuid()}): it would set variables on every "
            "host; write a file of your own, or chown it"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(f"{path} can be written by others (mode {mode:o}): chmod go-w {path}")
    values: dict[str, str] = {}
    faults = []
    for number, raw in lines:
        try:
            values.update(_parse_line(raw))
        except ValueError as error:
            faults.append(f"{path}, line {number}: {error}")
    raise_faults(faults, noun="bad environment line")
    return values


def write_environment_file(path: Path, values: Mapping[str, str]) -> Path | None:
    """Write lines that the launcher can read, too (no comment, no blank line), and keep a copy of the former file.

    Returns the path of the copy; None if there was no file.
    """
    text = "".join(f"{name}={value}\n" for name, value in values.items())
    copy = None
    with replacing(path) as fresh:
        if path.exists():
            copies = (path.with_name(f"{path.name}.before-{number}") for number in range(1, 1000))
            copy = next(free for free in copies if not free.exists())
            os.link(path, copy)
        fresh.touch(0o600)
        fresh.write_text(text, encoding="utf-8")
    return copy


def environment_files() -> list[Path]:
    """Return the files that DeepSpeed reads: in the home, then in the working directory, which wins.

    DS_ENV_FILE is another name for both; an absolute path there is one file, and so is a home that is the working
    directory.
    """
    name = os.environ.get("DS_ENV_FILE", ENVIRONMENT_FILE)
    files: list[Path] = []
    for folder in (os.path.expanduser("~"), "."):
        path = Path(os.path.join(folder, name))
        if path.is_file() and not any(path.samefile(other) for other in files):
            files.append(path)
    return files


def environment_of_ranks() -> dict[str, str]:
    """Return what `finetune launch` sets for ranks on every host: exported variables of this process, then of files."""
    files = environment_files()
    named = os.environ.get("DS_ENV_FILE")
    if named and not files:
        raise ConfigError(f"DS_ENV_FILE={named}: there is no such file in {Path.cwd()} or {os.path.expanduser('~')}")
    values = {name: value for name, value in os.environ.items() if is_exported(name)}
    for path in files:
        values |= read_environment_file(path)
    return values


def _parse_line(raw: bytes) -> dict[str, str]:
    """{name: value} of a line, {} for a comment or an empty line. Raises ValueError that shows no value."""
    line = decode_line(raw)
    if line is None:
        return {}
    key, equals, value = line.partition("=")
    key = _EXPORT.sub("", key, count=1) if _EXPORT.match(key) else key
    if not equals:
        raise ValueError(f'no "=" after {_abridge(key, SHOWN_OF_LINE)}: write NAME=value, or # for a comment')
    if not _NAME.fullmatch(key):
        if _NAME.fullmatch(key.strip()):
            raise ValueError(f'a space before "=": write {key.strip()}=value')
        raise ValueError(
            f"{_abridge(key, SHOWN_OF_NAME)} is not a name: expected letters, digits and _, not a digit first"
        )
    if "\0" in value:
        raise ValueError(f"{key} has a NUL character in its value: no variable can hold one")
    if value.startswith((" ", "\t")):
        raise ValueError(f'a space after "=": write {key}=value, with quotes where the value begins with a space')
    is_quoted = len(value) >= 2 and value[0] in "\"'" and value.find(value[0], 1) == len(value) - 1
    return {key: value[1:-1] if is_quoted else value}  # `"a b"` -> `a b`; `"a" "b"` and `"a` stay as they are


def _abridge(text: str, characters: int) -> str:
    return repr(text if len(text) <= characters else text[:characters] + "...")
