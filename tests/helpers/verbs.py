"""Run `finetune VERB ...` as a process of its own that imports nothing: it is forked from the server of `ranks`."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.helpers.paths import ROOT
from tests.helpers.ranks import FORKSERVER

LIMIT_SECONDS = 120


def finetune(*words: object, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a verb in the root of the clone, with standard input and output in files."""
    argv = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "stdin").write_bytes(stdin)
        process = FORKSERVER.Process(target=_main, args=(argv, folder, {**os.environ, **environment}))
        process.start()
        process.join(LIMIT_SECONDS)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(argv, LIMIT_SECONDS)
        outputs = ((Path(folder) / name).read_bytes() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(argv, process.exitcode, *outputs)


def finetune_text(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """As `finetune`, with the outputs decoded."""
    done = finetune(*words, **environment)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def _main(argv: list[str], folder: str, environment: Mapping[str, str]) -> None:
    from finetune.__main__ import main

    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    modes = {"stdin": os.O_RDONLY, "stdout": os.O_WRONLY | os.O_CREAT, "stderr": os.O_WRONLY | os.O_CREAT}
    for number, (name, mode) in enumerate(modes.items()):
        os.dup2(os.open(f"{folder}/{name}", mode), number)
    sys.stdin, sys.stdout, sys.stderr = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8"), open(2, "w", 1)
    sys.argv = ["finetune", *argv]
    main()
