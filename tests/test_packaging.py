"""An installed package finds its configs and its sample data without the clone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile

from conftest import ROOT

LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".venvs", ".models", "tests", "output", "build", "*.egg-info", "__pycache__"
)


def test_the_wheel_carries_configs_and_data(tmp_path):
    shutil.copytree(ROOT, tmp_path / "clone", ignore=LEFT_OUT)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", tmp_path, tmp_path / "clone"], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    shutil.rmtree(tmp_path / "clone")
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "finetune").rglob("*.py")}
    assert len(code) > 20 and code <= {str(path.relative_to(tmp_path / "site")) for path in tmp_path.rglob("site/**/*")}

    assert list(tmp_path.glob("site/finetune/evaluation/tasks/*.yaml"))
    assert (tmp_path / "site/finetune/data/forgetting.json").is_file()

    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import finetune\n"
        "from finetune.conversations import load_conversations, shipped_files\n"
        "from finetune.zero import find_config, load_config\n"
        "print(finetune.__file__, load_config(find_config('zero3'))['zero_optimization']['stage'])\n"
        "print([len(load_conversations(path)) for path in shipped_files()])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert str(tmp_path / "site") in first and first.endswith(" 3")
    assert [count >= 100 for count in json.loads(second)] == [True, True]
