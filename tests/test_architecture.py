"""Imports point one way along the line of the house, no module hides a dependency, no unit grows beyond its size."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "finetune"
# A name may import anything to its right, nothing to its left and nothing of its own group.
LINE = (
    {"finetune", "__main__"},
    {
        "tools.chat",
        "tools.convert",
        "tools.doctor",
        "tools.evaluate",
        "tools.launch",
        "tools.merge",
        "tools.preview",
        "tools.quickstart",
        "tools.report",
    },
    {"preflight", "train"},
    {"concluding", "planning", "report", "resuming"},
    {"answers", "chatting", "checking", "trainer"},
    {"evaluation", "generation", "merging", "rehearsal", "validation"},
    {"preparing"},
    {
        "arguments",
        "batches",
        "callbacks",
        "collation",
        "dataset",
        "interconnect",
        "losses",
        "parallelism",
        "samples",
        "saving",
        "shapes",
        "staging",
        "training_arguments",
        "terminal",
        "verifying",
    },
    {"adapters", "claiming", "loss_parts", "opening", "trials"},
    {
        "agreeing",
        "attention",
        "cluster",
        "console",
        "metrics",
        "model",
        "pages",
        "rendering",
        "results",
        "sampling",
        "start_up",
    },
    {"numbers"},
    {"checkpoints", "conversations", "memory", "packing", "ranks", "session", "skipping", "zero"},
    {"guard", "hardware", "hosts", "process", "stragglers", "trackers"},
    {"placing"},
    {"allreduce", "building", "failures", "host_probe", "stopping"},
    {"durable"},
    {"errors"},
)
WITHOUT_TORCH = {
    "answers",
    "arguments",
    "chatting",
    "checkpoints",
    "conversations",
    "zero",
    "hardware",
    "hosts",
    "errors",
    "failures",
    "rendering",
    "dataset",
    "memory",
    "metrics",
    "numbers",
    "packing",
    "pages",
    "preparing",
    "process",
    "report",
    "results",
    "samples",
    "sampling",
    "skipping",
    "start_up",
    "stragglers",
}
TAKEN_NAMES = {"datasets", "evaluate", "tokenizers", "peft", "accelerate", "deepspeed", "types", "logging", "inspect"}
TORCH_STACK = {"torch", "transformers", "deepspeed", "peft", "accelerate", "datasets"}
MAX_FILE, MAX_FUNCTION = 400, 80


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if path.name != "__init__.py":
            found[name] = path
        elif path.parent not in (PACKAGE, PACKAGE / "tools"):
            found[name.removesuffix(".__init__")] = path
    return found


def imports_of_ours(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "finetune":
            inner = node.module.partition(".")[2]
            if not inner or inner == "tools":
                found |= {".".join(filter(None, [inner, alias.name])) for alias in node.names}
            else:
                found.add(inner)
    return found


def room(name: str) -> str:
    """A folder that grew from one file keeps that file's place; every tool has its own."""
    return name if name.startswith("tools.") else name.partition(".")[0]


def test_every_module_has_a_place_on_the_line():
    assert {room(name) for name in modules()} == set.union(*LINE)


@pytest.mark.parametrize("name", modules())
def test_imports_point_right(name):
    place = {module: position for position, group in enumerate(LINE) for module in group}
    others = {room(other) for other in imports_of_ours(modules()[name])} - {room(name) if "." in name else None}
    inside = {room(name)} if modules()[name].name == "__init__.py" else set()
    wrong = [f"{name} -> {other}" for other in others - inside if place[other] <= place[room(name)]]
    assert wrong == []


def test_some_imports_were_seen():
    assert {"conversations", "errors", "rendering"} <= imports_of_ours(PACKAGE / "dataset" / "preparation.py")
    assert {"console", "model", "results"} <= imports_of_ours(PACKAGE / "train.py")


@pytest.mark.parametrize("name", [name for name in modules() if room(name) in WITHOUT_TORCH])
def test_the_torch_stack_is_imported_only_where_it_is_used(name):
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert top
    named = {alias.name.split(".")[0] for node in top if isinstance(node, ast.Import) for alias in node.names}
    named |= {(node.module or "").split(".")[0] for node in top if isinstance(node, ast.ImportFrom)}
    assert not named & TORCH_STACK


def test_no_module_hides_a_dependency_under_path_launch():
    assert not {path.stem for path in PACKAGE.glob("*.py")} & TAKEN_NAMES


@pytest.mark.parametrize("path", [*PACKAGE.rglob("*.py"), *(ROOT / "tests").glob("*.py")], ids=lambda path: path.name)
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    if path.is_relative_to(PACKAGE):
        assert text.count("\n") <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION, f"{node.name} is too long"


def test_the_story_is_a_table_of_contents():
    tree = ast.parse((PACKAGE / "train.py").read_text(encoding="utf-8"))
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert main.end_lineno - main.lineno <= 40
    assert not [node for node in ast.walk(main) if isinstance(node, ast.If)]
