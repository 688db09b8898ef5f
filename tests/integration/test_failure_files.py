"""`failure.json` on disks that refuse and with many writers; the imports of a watchdog process."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from finetune.diagnostics import read_failure, write_failure
from tests.helpers.failure_samples import raised
from tests.helpers.paths import ROOT

PYTHON = [sys.executable, "-S", "-I"]
PYYAML = Path(yaml.__file__).parent.parent


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_the_old_record_and_nothing_else(tmp_path):
    with mounted(tmp_path / "disk", "size=4k") as disk:
        earlier = write_failure(disk, raised("small", run="r1"))
        content = earlier.read_bytes()
        assert write_failure(disk, raised("large", run="r2", traceback="x" * 1999 + "\n" + "y" * 1999)) is None
        assert os.listdir(disk) == ["failure.json"] and earlier.read_bytes() == content


def test_a_read_only_disk_gives_none(tmp_path):
    with mounted(tmp_path / "disk", "ro,size=1m") as disk:
        assert write_failure(disk, raised("x")) is None


def test_of_many_writers_at_once_the_record_of_one_is_kept(tmp_path):
    code = (
        "import os, sys; sys.path += sys.argv[1:3]\n"
        "from finetune.diagnostics import Failure, write_failure\n"
        "sys.stdin.read()\n"
        "assert write_failure(sys.argv[3], Failure('died', 'x' * 3000, run='r', when='2026-01-01T00:00:00+00:00',"
        " rank=os.getpid()))\n"
    )
    command = [*PYTHON, "-c", code, str(ROOT), str(PYYAML), str(tmp_path)]
    writers = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(6)]
    for writer in writers:
        writer.stdin.close()
    assert [writer.wait() for writer in writers] == [0] * 6
    assert os.listdir(tmp_path) == ["failure.json"]
    assert read_failure(tmp_path / "failure.json").rank in {writer.pid for writer in writers}


def test_the_package_imports_fast_and_needs_nothing_but_pyyaml():
    code = (
        "import sys; sys.path += sys.argv[1:]; before = set(sys.modules)\n"
        "from finetune import diagnostics\n"
        "assert 'yaml' not in sys.modules\n"
        "assert 'Likely cause: ' in diagnostics.format_failure_page(diagnostics.Failure('died', signal=9))\n"
        "names = {name for name in set(sys.modules) - before if hasattr(sys.modules[name], '__file__')}\n"
        "print(*{name.partition('.')[0] for name in names})\n"
    )
    command = [*PYTHON, "-X", "importtime", "-c", code, str(ROOT), str(PYYAML)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    modules = set(runs[0].stdout.split())
    assert {"finetune", "json"} <= modules
    assert modules - {"finetune", "yaml", "_yaml"} <= set(sys.stdlib_module_names)
    taken = min(int(re.search(r"(\d+) \| +finetune\.diagnostics$", run.stderr, re.M)[1]) for run in runs)
    assert taken < 500_000  # microseconds; about 40,000 on an idle machine
