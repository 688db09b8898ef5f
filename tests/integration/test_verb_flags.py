"""No option of a verb is dead: what the verb does with it and without it differs."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from finetune.__main__ import app
from finetune.cli import evaluate
from finetune.cli.launch import NOT_HANDED_ON, handed_on
from finetune.config import DoctorArguments, EvaluateArguments, PreviewArguments
from finetune.launcher import LauncherArgs, parse_launcher_args
from finetune.utils.errors import FinetuneError
from tests.helpers.paths import ROOT
from tests.integration.test_flag_effects import source_of


class Calls(list):
    """What was called with what, in the place of what needs a model."""

    def to(self, name: str, returns: Any = None) -> Callable[..., Any]:
        return lambda *given, **named: self.append((name, str(given), str(named))) or returns


OF_VERBS: dict[str, dict[str, tuple[str, str]]] = {
    "preview": {
        "rows": ("", "--rows 1"), "sample": ("", "--sample 2"), "seed": ("--sample 2", "--seed 5"),
        "json": ("", "--json"), "html": ("", "--html DIR/page.html"),
    },
    "evaluate": {
        "base_model": ("--forgetting", "--base_model other"), "no_base": ("--data_path d", "--no_base"),
        "json": ("--forgetting", "--json"), "tokens_per_batch": ("--data_path d", "--tokens_per_batch 9"),
        "worst": ("--data_path d", "--worst 2"), "tasks": ("--forgetting", "--tasks t"),
        "num_fewshot": ("--tasks t", "--num_fewshot 2"), "limit": ("--tasks t", "--limit 2"),
        "batch_size": ("--tasks t", "--batch_size 2"), "apply_chat_template": ("--tasks t", "--apply_chat_template"),
        "allow_code_execution": ("--tasks t", "--allow_code_execution"), "forgetting": ("--tasks t", "--forgetting"),
        "fail_below": ("--forgetting", "--fail_below 2"),
    },
    "merge": {
        "target": ("", "elsewhere"), "base_model": ("", "--base_model other"), "dtype": ("", "--dtype fp16"),
        "max_shard_size": ("", "--max_shard_size 7MB"), "gguf": ("", "--gguf q8_0"), "no_check": ("", "--no_check"),
    },
    "quickstart": {
        "output_dir": ("", "--output_dir other"), "model_dir": ("", "--model_dir other"),
        "only_model": ("", "--only_model"), "short": ("", "--short"),
    },
    "report": {
        "output_dirs": ("", "other"), "html": ("", "--html DIR/r.html"), "prompts": ("", "--prompts DIR/prompts.txt"),
        "no_answers": ("", "--no_answers"), "base_model": ("", "--base_model other"), "watch": ("", "--watch"),
        "every": ("--watch", "--every 2"), "port": ("--watch", "--port 9"),
    },
    "chat": {
        "base": ("", "--base"), "compare": ("", "--compare"), "base_model": ("", "--base_model other"),
        "system": ("", "--system Hello"), "max_new_tokens": ("", "--max_new_tokens 3"),
        "temperature": ("", "--temperature 0.5"), "top_p": ("", "--top_p 0.5"), "seed": ("", "--seed 3"),
        "reasoning": ("", "--reasoning"), "trust_remote_code": ("DIR/plain", "--trust_remote_code"),
        "json": ("", "--json"), "web": ("", "--web"), "host": ("--web", "--host 0.0.0.0"),
        "port": ("--web", "--port 9"),
    },
}  # fmt: skip
OF_THE_DOCTOR = {
    "json": "test_doctor.py::test_it_foresees_what_the_run_then_does",
    "full": "test_hosts_doctor.py::test_hosts_that_are_alike_are_joined_measured_and_written_down",
    "write_env": "test_hosts_doctor.py::test_hosts_that_are_alike_are_joined_measured_and_written_down",
    "stage": "test_hosts_doctor.py::test_what_hosts_lack_is_staged_and_what_differs_is_kept_aside",
    "rehearse": "test_hosts_doctor.py::test_a_rehearsal_runs_the_whole_chain_on_hosts_without_a_shared_disk",
}


@pytest.fixture
def verb(tiny_model, conversation_file, monkeypatch, tmp_path) -> Callable[..., Any]:
    """Calls a verb by its command line; what it says, and what it asks of what needs a model."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    previewed = ["--model_name_or_path", str(tiny_model), "--data_path", str(conversation_file)]
    (tmp_path / "prompts.txt").write_text("Who?\n")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/config.json").write_text("{}")

    def run(name: str, words: str) -> Any:
        calls = Calls()
        put_aside(name, calls, monkeypatch)
        first = {"preview": previewed, "quickstart": []}.get(name, ["output"])
        given = words.replace("DIR", str(tmp_path)).split()
        if given and name == "chat" and not given[0].startswith("-"):
            first = []
        done = CliRunner().invoke(app, [name, *first, *given], input="Hi\n")
        assert done.exit_code in (0, None) or isinstance(done.exception, FinetuneError), (done.output, done.exc_info)
        return re.sub(r"0x\w+|[\d.]+ ?s(econds)?", "", done.output + str(calls) + repr(done.exception))

    return run


def put_aside(verb: str, calls: Calls, monkeypatch: Any) -> None:
    """Leave out what needs a result or a model, and note how it is called."""
    result = SimpleNamespace(folder=Path("output"), run={}, chat={"stop_token_id": 2})
    at = f"finetune.cli.{verb}"
    found = {
        "evaluate": {
            f"{at}.read_result": result, f"{at}.eval_results.check_writable": None, f"{at}.prepare_held_out": object(),
            f"{at}.eval_results.versioned": {}, f"{at}.eval_results.write_results": None,
            f"{at}.print_sections": None, f"{at}.init_process_group": None,
            "finetune.inference.load_result.load_for_inference": None,
            "finetune.evaluation.held_out.evaluate_held_out": {},
            "finetune.evaluation.benchmarks.find_jobs": ["job"], f"{at}._fail_if_below": None,
            "finetune.evaluation.benchmarks.evaluate_benchmarks": {}, f"{at}.destroy_process_group": None,
            "finetune.evaluation.forgetting.evaluate_forgetting": {}, f"{at}.enable_gc": None,
            f"{at}.keep_freed_blocks": None, f"{at}.prepare_environment": None,
        },
        "merge": {
            f"{at}.read_result": result, "finetune.inference.load_result.load_tokenizer": None,
            "finetune.export.check_gguf": None,
            "finetune.export.plan_merge": SimpleNamespace(origin="x", pieces=[], size=0, source=None, tokenizer=None),
            "finetune.export.merge_weights": SimpleNamespace(notes=[], size=0, checked="checked"),
            "finetune.export.write_gguf": Path(__file__),
        },
        "quickstart": {
            f"{at}.obtain_model": None, f"{at}.train": None, f"{at}.read_result": None, f"{at}._answers": [],
            f"{at}.load_for_inference": SimpleNamespace(base=lambda: nullcontext(), tuned=None), f"{at}._show": 99,
        },
        "report": {
            f"{at}.read_run": SimpleNamespace(state="complete", answers=None, cards=[], folder=Path("f"), name="run"),
            f"{at}.write_report": None, f"{at}.keep_watching": None, f"{at}.pages.check_replaceable": None,
            f"{at}.read_result": result, f"{at}.generate_answers": None, f"{at}.write_answers": None,
            f"{at}.prompts_of": ["prompt"],
        },
        "chat": {
            f"{at}.read_result": result, f"{at}.read_model": result, f"{at}.check_gradio": None,
            f"{at}.load_for_inference": SimpleNamespace(chat_format=None, stop_token_ids=[]), f"{at}.serve": None,
            f"{at}.depends_on_reasoning": True, f"{at}.answer_once": None, f"{at}.ChatModels": None,
        },
    }.get(verb, {})  # fmt: skip
    for name, returns in found.items():
        monkeypatch.setattr(name, calls.to(name.rpartition(".")[2], returns))
    if verb == "evaluate":
        monkeypatch.setattr(f"{at}.eval_results.SECTIONS", dict.fromkeys(evaluate.eval_results.SECTIONS, str))
    if verb == "chat":
        monkeypatch.setattr(f"{at}.ChatSession", lambda system: f"chat with {system}")


@pytest.mark.parametrize(("name", "option"), [(verb, option) for verb, found in OF_VERBS.items() for option in found])
def test_an_option_of_a_verb_has_an_effect(name, option, verb, tmp_path):
    others, given = OF_VERBS[name][option]
    if option != "html":
        assert verb(name, f"{others} {given}") != verb(name, others)
        return
    verb(name, given)
    assert verb(name, given) != verb(name, others)


def test_every_option_of_every_verb_has_an_entry_and_a_help_text():
    verbs = get_command(app).commands
    own = {"preview": PreviewArguments, "evaluate": EvaluateArguments, "doctor": DoctorArguments}
    assert {*OF_VERBS, "doctor", "launch", "convert"} == set(verbs)
    for name, command in verbs.items():
        if name in own:
            options = {one.name: one.metadata["help"] for one in fields(own[name])}
        else:
            shown = [one for one in command.params if one.name != "help"]
            options = {(one.opts[0].lstrip("-") or one.name): one.help for one in shown}
        listed = {*OF_VERBS.get(name, {}), *(OF_THE_DOCTOR if name == "doctor" else ())}
        assert options.keys() - {"output"} == listed, name
        assert all(options.values()), name


@pytest.mark.parametrize("flag", OF_THE_DOCTOR)
def test_a_test_of_the_doctor_gives_the_option(flag):
    assert f'"--{flag}"' in source_of(OF_THE_DOCTOR[flag])


def test_every_flag_of_the_launcher_is_handed_on_or_read():
    text = "".join(path.read_text("utf-8") for path in (ROOT / "finetune").rglob("*.py") if path.name != "flags.py")
    typed = [one for one in fields(LauncherArgs) if one.default is not MISSING and one.name != "given"]
    assert len(typed) > 20
    for one in typed:
        if one.name in (*NOT_HANDED_ON, "module"):
            read = re.search(rf"flags\.{one.name}\b|\bgiven\.get\(\"{one.name}\"", text)
            assert read or one.name == "force_multi", f"{one.name}; a host is reached over ssh unless it is this one"
            continue
        value = next(iter(one.metadata["choices"] or ()), "1")
        words = [f"--{one.name}"] if one.default is False else [f"--{one.name}={value}"]
        assert words[0] in handed_on(parse_launcher_args([*words, "script.py"])), one.name


def test_every_option_is_used_by_the_verb_that_declares_it():
    tree = ast.parse((ROOT / "finetune/__main__.py").read_text(encoding="utf-8"))
    verbs = [
        node for node in tree.body
        if isinstance(node, ast.FunctionDef) and len(node.args.args) > 1 and node.name != "_every_verb"
    ]  # fmt: skip
    assert len(verbs) >= 4
    for function in verbs:
        used = {node.id for line in function.body for node in ast.walk(line) if isinstance(node, ast.Name)}
        assert {one.arg for one in function.args.args} <= used, function.name
