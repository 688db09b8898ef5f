"""The names of `finetune evaluate --tasks`, checked without lm-eval, which parses 14,000 files for half a minute."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from finetune.evaluation.lingowhale_benchmarks import SUITE
from finetune.utils.errors import ConfigError, did_you_mean, missing_reason, raise_faults
from finetune.utils.options import source_folder

INSTALL = "pip install 'lm_eval>=0.4.13,<0.5'"
OWN_TASKS = Path(__file__).resolve().parent / "tasks"
SUFFIXES = (".yaml", ".yml")
SUFFIXES_OF_TEXTS = (*SUFFIXES, "")  # what a YAML file includes has none
_DECLARED = re.compile(r"^[ -]*\"?(?:task|group|tag)\"?: *[\"']?([\w.-]+)", re.MULTILINE)


def split_names(given: Sequence[str]) -> list[str]:
    """Return the names between spaces and commas."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"--tasks needs lm-evaluation-harness, which is not installed: {INSTALL}")
    names = [part for name in given for part in name.split(",") if part]
    if not names:
        raise ConfigError("--tasks names no task")
    return names


def check_names(given: Sequence[str]) -> None:
    """Check that files and folders of tasks are there, and that some file of lm-eval has each other name as a word."""
    names = {name: Path(name).exists() for name in split_names(given) if name != SUITE}
    paths = [name for name in names if "/" in name or name.endswith(SUFFIXES)]
    unknown = {name for name, is_there in names.items() if not is_there} - {*paths}
    faults = [f"--tasks {name}: {missing_reason(Path(name))}" for name in paths if not names[name]]
    if unknown:
        folders = (OWN_TASKS, source_folder("lm_eval") / "tasks", *filter(Path.is_dir, map(Path, names)))
        files = [file for folder in folders for file in folder.rglob("*") if file.suffix in SUFFIXES_OF_TEXTS]
        texts = [file.read_text("utf-8", "replace") for file in files if file.is_file()]
        spelled = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, unknown))})(?![\w-])")
        unknown = unknown.difference(*(spelled.findall(text) for text in texts))
        known = {name for text in texts for name in _DECLARED.findall(text)} if unknown else ()
        for name in sorted(unknown):
            remedy = did_you_mean(name, known, "see lm-eval ls tasks", most=3, cutoff=0.8)
            faults.append(f"--tasks {name}: lm-eval knows no such task: {remedy}")
    raise_faults(faults)
