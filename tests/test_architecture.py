"""The import direction of the packages, the modules that start without torch, and the sizes of files and functions."""

import ast
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "finetune"
# A package may import packages of later lines only. Type-only imports and imports inside functions count.
LAYERS = (
    {"finetune", "__main__"},
    {"cli"},
    {"train"},
    {"evaluation", "preflight"},
    {"report"},
    {"training"},
    {"export"},
    {"inference"},
    {"models"},
    {"checkpoint"},
    {"config"},
    {"launcher", "run_dir"},
    {"distributed", "dataset"},
    {"diagnostics", "chat_templates"},
    {"conversation", "utils"},
)
LAYER_OF = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}
# The public API and the entry scripts load what they name on demand.
IMPORTS_ANYTHING = {"__init__"}
WITHOUT_TORCH = {
    "chat_templates",
    "config",
    "conversation",
    "dataset",
    "diagnostics",
    "launcher",
    "report",
    "run_dir",
    "utils",
}
NEEDS_TORCH = {"dataset.collator", "dataset.dataloader"}
# The launcher puts `finetune/` itself on sys.path: no module there may have the name of a library.
TAKEN_NAMES = {"datasets", "evaluate", "tokenizers", "peft", "accelerate", "deepspeed", "types", "logging", "inspect"}
TORCH_STACK = {"torch", "transformers", "deepspeed", "peft", "accelerate", "datasets"}
MAX_FILE, MAX_FUNCTION, MAX_FLAT_MODULES = 400, 80, 6


def modules() -> dict[str, Path]:
    """All modules of the package by their dotted name below `finetune`; a package by the name of its folder."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        names[name if name == "__init__" else name.removesuffix(".__init__")] = path
    return names


MODULES = modules()


def imported_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {
                alias.name.removeprefix("finetune.") for alias in node.names if alias.name.startswith("finetune.")
            }
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "finetune":
            continue
        base = node.module.partition(".")[2]
        for alias in node.names:
            full = f"{base}.{alias.name}".lstrip(".")
            names.add(full if full in MODULES else base)
    return names - {""}


def package_of(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_belongs_to_a_layer():
    assert {package_of(name) for name in MODULES} - IMPORTS_ANYTHING == set(LAYER_OF)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in IMPORTS_ANYTHING])
def test_imports_point_to_later_layers(name):
    package = package_of(name)
    others = {package_of(other) for other in imported_modules(MODULES[name])} - {package}
    assert [other for other in others if LAYER_OF[other] <= LAYER_OF[package]] == []


def test_no_module_imports_itself_through_others():
    graph = {name: imported_modules(path) - {name} for name, path in MODULES.items() if not path.name == "__init__.py"}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done and name in graph:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_some_imports_were_seen():
    assert {"chat_templates", "utils.errors"} <= imported_modules(
        PACKAGE / "training" / "data_setup.py"
    ) | imported_modules(PACKAGE / "dataset" / "prepare.py")


@pytest.mark.parametrize(
    "name", [name for name in MODULES if package_of(name) in WITHOUT_TORCH - {""} and name not in NEEDS_TORCH]
)
def test_the_torch_stack_is_imported_only_where_it_is_used(name):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    named = {alias.name.split(".")[0] for node in top if isinstance(node, ast.Import) for alias in node.names}
    named |= {(node.module or "").split(".")[0] for node in top if isinstance(node, ast.ImportFrom)}
    assert not named & TORCH_STACK


def test_the_top_of_the_package_stays_small():
    flat = {path.stem for path in PACKAGE.glob("*.py")}
    assert len(flat) <= MAX_FLAT_MODULES and not flat & TAKEN_NAMES


def test_no_class_has_the_name_of_another():
    seen: dict[str, str] = {}
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                assert node.name not in seen, f"{node.name}: {seen[node.name]} and {name}"
                seen[node.name] = name


def test_no_file_stem_stands_for_two_modules():
    stems: dict[str, str] = {}
    for name, path in MODULES.items():
        # A verb has the name of what it calls; each package keeps its patches of libraries in a `compat.py`.
        if path.name not in ("__init__.py", "compat.py") and package_of(name) != "cli":
            assert path.stem not in stems, f"{stems[path.stem]} and {name}"
            stems[path.stem] = name


@pytest.mark.parametrize("path", [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")], ids=lambda path: path.name)
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    if path.is_relative_to(PACKAGE):
        assert text.count("\n") <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION, f"{node.name} is too long"


def test_the_entry_reads_as_a_table_of_contents():
    tree = ast.parse((PACKAGE / "train.py").read_text(encoding="utf-8"))
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run_training")
    assert main.end_lineno - main.lineno <= 40
    assert not [node for node in ast.walk(main) if isinstance(node, ast.If)]
