"""The documents: commands parse, links resolve, the reference of flags is current."""

import re
import runpy
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from finetune.cli import doctor, train
from finetune.config import parse
from finetune.dataset.content_parts import REASONING_KEYS
from finetune.dataset.row_formats import ROW_WEIGHTS, SYSTEM_KEYS, TURN_LISTS
from finetune.dataset.tool_reading import TOOL_KEYS
from finetune.dataset.turn_reading import CALL_KEYS, ROLES, WEIGHTS
from finetune.launcher import parse_launcher_args
from tests import oldest_and_newest
from tests.helpers.paths import ROOT

README_BYTES, CONTRIBUTING_BYTES = 12_288, 5_120
READMES = sorted([ROOT / "README.md", ROOT / "README_zh.md", *ROOT.glob("*/README.md")])
PAGES = [*READMES, *sorted(ROOT.glob("docs/**/*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
REQUIRED = {"model_name_or_path": "M", "data_path": "D", "output_dir": "O"}
VERBS = ("preview", "convert", "evaluate", "merge", "report", "chat", "quickstart", "recipes")
MADE_BY_RUNS = ("finetune/data/", "benchmarks/.venvs")  # not files of the repository
TRAINING_SCRIPT = "finetune/finetune.py"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands_in(page: Path) -> list[list[str]]:
    """Return the commands of the shell blocks of a page as words, comments removed."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```shell\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def commands_of(*programs: str) -> list[pytest.param]:
    """Return every documented command that begins with one of these words, with its page in the test id."""
    found = []
    for page in PAGES:
        for words in commands_in(page):
            if "|" in words:  # echo ... | finetune chat ...
                words = words[words.index("|") + 1 :]
            if " ".join(words).startswith(tuple(f"{program} " for program in programs)):
                found.append(pytest.param(words, id=f"{name_of(page)}-{len(found)}"))
    return found


def completed(words: list[str]) -> list[str]:
    """Return the flags of a training command; where it has an ellipsis, with the required flags it leaves out."""
    if "..." not in words:
        return words
    flags = [word for word in words if word != "..."]
    missing = [(f"--{name}", value) for name, value in REQUIRED.items() if f"--{name}" not in flags]
    return [*flags, *(word for pair in missing for word in pair)]


@pytest.mark.parametrize("words", commands_of("deepspeed"))
def test_training_commands_parse(words):
    launcher = parse_launcher_args(words[1:])
    if launcher.script == TRAINING_SCRIPT:
        assert parse(completed(launcher.script_args)).training["output_dir"]
    else:
        assert launcher.module and launcher.script.startswith("finetune")


@pytest.mark.parametrize("words", commands_of("finetune train"))
def test_commands_of_train_parse(words, monkeypatch):
    stored = dict.fromkeys(REQUIRED, "x")
    monkeypatch.setattr("finetune.config.argument_parser.read_mapping", lambda *given: stored)
    assert parse(completed(train.parse_options(words[2:]).script_args)).training["output_dir"]


@pytest.mark.parametrize("words", commands_of("finetune doctor"))
def test_doctor_commands_parse(words):
    _, _, training = doctor.parse_options(completed(words[2:]))
    assert parse(training).training["output_dir"]


@pytest.mark.parametrize("words", commands_of(*(f"finetune {verb}" for verb in VERBS)))
def test_commands_of_the_other_verbs_parse(words):
    verb = import_module(f"finetune.cli.{words[1]}")
    if hasattr(verb, "parse_options"):
        verb.parse_options(words[2:])
    else:
        verb.build_parser().parse(words[2:])


def test_commands_were_found():
    assert len(commands_of("deepspeed")) > 5 and len(commands_of("finetune train")) > 20
    assert {words.values[0][1] for words in commands_of("finetune")} >= {
        "doctor",
        "train",
        "chat",
        "merge",
        "evaluate",
    }


def test_make_targets_and_scripts_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {target for page in PAGES for target in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text("utf-8"), re.M)}
    assert {"quickstart", "test", "docs"} <= named <= targets
    scripts = {
        word for page in PAGES for words in commands_in(page) for word in words if word.endswith((".py", ".sbatch"))
    }
    assert TRAINING_SCRIPT in scripts
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page):
    links = re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8"))
    targets = [(page.parent / path if path else page, anchor) for path, anchor in links]
    assert [path for path, _ in targets if not path.exists()] == []
    if page in READMES:  # mkdocs checks the anchors of the other pages
        assert [(path.name, anchor) for path, anchor in targets if anchor and anchor not in anchors_of(path)] == []


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and mkdocs write them, and those set by hand."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


def test_named_files_exist():
    named = r"`((?:finetune|tests|docs|hostfiles|ds_configs|benchmarks)/[a-z0-9_/.]+)`"
    paths = {(name_of(page), path) for page in PAGES for path in re.findall(named, page.read_text(encoding="utf-8"))}
    paths = {(page, path) for page, path in paths if not path.startswith(MADE_BY_RUNS)}
    assert len(paths) > 10
    assert [(page, path) for page, path in paths if not (ROOT / path).exists()] == []


def test_the_tests_of_the_version_ranges_exist():
    for name in oldest_and_newest.TESTS:
        path, _, function = name.partition("::")
        assert f"def {function}" in (ROOT / path).read_text(encoding="utf-8"), name


def test_pages_of_the_navigation_exist():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)
    assert len(pages) > 20
    assert {ROOT / "docs" / page for page in pages} == {
        page for page in ROOT.glob("docs/**/*.md") if not page.name.endswith(".zh.md")
    }


@pytest.mark.parametrize(
    ("page", "limit"),
    [("README.md", README_BYTES), ("README_zh.md", README_BYTES), ("CONTRIBUTING.md", CONTRIBUTING_BYTES)],
)
def test_front_pages_stay_short(page, limit):
    assert (ROOT / page).stat().st_size <= limit


def test_the_reference_of_flags_is_current():
    generated = runpy.run_path(str(ROOT / "docs" / "generate_flags.py"))["flags_page"]()
    assert generated.count("\n| `--") > 60
    assert (ROOT / "docs/reference/flags.md").read_text(encoding="utf-8") == generated, "run `make docs`"


@pytest.mark.parametrize("name", ["data-formats.md", "data-formats.zh.md"])
def test_the_guide_to_data_names_every_key_that_is_read(name):
    text = (ROOT / "docs/guides" / name).read_text(encoding="utf-8")
    keys = {*TURN_LISTS, *SYSTEM_KEYS, *TOOL_KEYS, *REASONING_KEYS, *ROW_WEIGHTS, *WEIGHTS, *CALL_KEYS, *ROLES}
    assert len(keys) > 40 and [key for key in sorted(keys) if not re.search(rf'[`"]{key}[`"]', text)] == []


def test_the_chinese_reference_names_the_same_flags_with_the_same_defaults():
    english, chinese = (flags_of(ROOT / "docs/reference" / name) for name in ("flags.md", "flags.zh.md"))
    assert len(english) > 10 and chinese == english


def flags_of(page: Path) -> list[dict[str, str]]:
    """Return the default of each flag, one mapping for each table, without that of old names."""
    tables = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    tables = [table for table in tables if not table.startswith(("Old names", "旧名字"))]
    rows = [re.findall(r"^\| `--(\w+)` \| .*?(?:\[([^]]*)\] )?\|$", table, re.MULTILINE) for table in tables]
    return [{name: default.replace("False", "") for name, default in row} for row in rows]
