"""An installed package finds its configs and its sample data without the clone."""

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from unittest import mock

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".venvs", ".models", "tests", "output", "build", "*.egg-info", "__pycache__"
)


def distribution(requirement: str) -> str:
    return canonicalize_name(Requirement(requirement).name)


def pins(file: str) -> dict[str, str]:
    return {
        canonicalize_name(name): version
        for name, version in re.findall(r"(?m)^(\S+)==(\S+)", (ROOT / file).read_text())
    }


def test_the_wheel_carries_configs_and_data(tmp_path):
    shutil.copytree(ROOT, tmp_path / "clone", ignore=LEFT_OUT)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", tmp_path, tmp_path / "clone"], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    shutil.rmtree(tmp_path / "clone")
    installed = {str(path.relative_to(tmp_path / "site")) for path in tmp_path.rglob("site/**/*")}
    files = [path for path in (ROOT / "finetune").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) > 20 and {str(path.relative_to(ROOT)) for path in files} <= installed
    assert {
        "finetune/py.typed",
        "finetune/data/forgetting.json",
        "finetune/ds_configs/zero3.json",
        "finetune/recipes/reasoning.yaml",
    } <= installed
    assert "finetune/diagnostics/known_causes.yaml" in installed  # no watchdog starts without it

    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import finetune\n"
        "from finetune.dataset.conversation_reader import read_conversations\n"
        "from finetune.dataset.data_sources import shipped_files\n"
        "from finetune.config.deepspeed_config import find_config, load_config\n"
        "print(finetune.__file__, load_config(find_config('zero3'))['zero_optimization']['stage'])\n"
        "from finetune.cli import train\n"
        "print(train.parse_options(['a.yaml']).script)\n"
        "print([len(read_conversations(path)) for path in shipped_files()])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    first, script, second = done.stdout.splitlines()
    assert (tmp_path / script).samefile(tmp_path / "site/finetune/finetune.py")
    assert str(tmp_path / "site") in first and first.endswith(" 3")
    assert [count >= 100 for count in json.loads(second)] == [True, True]


def test_what_is_imported_is_required():
    extras = [requirement for extra in PROJECT["optional-dependencies"].values() for requirement in extra]
    names = {distribution(requirement).replace("-", "_") for requirement in [*PROJECT["dependencies"], *extras]}
    # PyYAML's; jinja2 is made of it; markdown-it-py's; jsonschema is made of it
    names |= {"yaml", "markupsafe", "markdown_it", "referencing"}
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "finetune").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    imported = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) - {"finetune"}
    assert {"torch", "safetensors"} <= imported <= names


def test_the_tested_versions_lie_in_the_ranges():
    running = pins("requirements.txt")
    assert "torch" in running and not set(running) & set(pins("requirements-dev.txt"))
    assert {distribution(requirement) for requirement in PROJECT["dependencies"]} <= set(running)
    pinned = running | pins("requirements-dev.txt")
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(requirement for extra in extras.values() for requirement in extra)]
    for requirement in map(Requirement, wanted):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is None or requirement.specifier.contains(version), f"{requirement}, pinned {version}"


def test_the_page_of_the_package_has_no_link_to_a_file_beside_it():
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    text = setup.call_args.kwargs["long_description"]
    assert "](https://" in text and re.findall(r"\]\((?!https?:|#)", text) == []
