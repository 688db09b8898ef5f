"""No option of a verb is dead: what the verb does with it and without it differs."""

import io
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune import cli
from finetune.cli import evaluate
from finetune.config import DataArguments, ModelArguments
from finetune.launcher import build_parser, parse_launcher_args
from finetune.launcher.supervisor import NOT_PASSED_ON, SupervisedRun
from finetune.utils.errors import ConfigError, FinetuneError
from tests.helpers.paths import ROOT


class Calls(list):
    """What was called with what, in the place of what needs a model."""

    def to(self, name: str, returns: Any = None) -> Callable[..., Any]:
        return lambda *given, **named: self.append((name, str(given), str(named))) or returns


OF_VERBS: dict[str, dict[str, tuple[str, str]]] = {
    "preview": {
        "rows": ("", "--rows 1"), "sample": ("", "--sample 2"), "seed": ("--sample 2", "--seed 5"),
        "json": ("", "--json"), "html": ("", "--html DIR/page.html"), "limit": ("", "--limit 1"),
        "stats": ("", "--stats --tasks no.yaml"), "tasks": ("--stats --tasks no.yaml", "--tasks other.yaml"),
        "config": ("", "--config DIR/recipe.yaml"),
    },
    "evaluate": {
        "base_model": ("--forgetting", "--base_model other"), "no_base": ("--data_path d", "--no_base"),
        "json": ("--forgetting", "--json"), "tokens_per_batch": ("--data_path d", "--tokens_per_batch 9"),
        "worst": ("--data_path d", "--worst 2"), "tool_rows": ("--data_path d", "--tool_rows 2"),
        "tasks": ("--forgetting", "--tasks t"),
        "num_fewshot": ("--tasks t", "--num_fewshot 2"), "limit": ("--tasks t", "--limit 2"),
        "batch_size": ("--tasks t", "--batch_size 2"), "apply_chat_template": ("--tasks t", "--apply_chat_template"),
        "allow_code_execution": ("--tasks t", "--allow_code_execution"), "forgetting": ("--tasks t", "--forgetting"),
        "fail_below": ("--forgetting", "--fail_below 2"), "trust_remote_code": ("--tasks t", "--trust_remote_code"),
        "verify_key": ("--tasks t", "--verify_key K"),
    },
    "merge": {
        "target": ("", "elsewhere"), "base_model": ("", "--base_model other"), "dtype": ("", "--dtype fp16"),
        "max_shard_size": ("", "--max_shard_size 7MB"), "gguf": ("", "--gguf q8_0"), "no_check": ("", "--no_check"),
        "trust_remote_code": ("", "--trust_remote_code"), "verify_key": ("", "--verify_key K"),
    },
    "push": {"repo": ("--yes", "me/name"), "private": ("me/name --yes", "--private"), "yes": ("me/name", "--yes")},
    "quickstart": {
        "output_dir": ("", "--output_dir other"), "model_dir": ("", "--model_dir other"),
        "only_model": ("", "--only_model"), "short": ("", "--short"),
    },
    "report": {
        "output_dirs": ("", "other"), "html": ("", "--html DIR/r.html"), "prompts": ("", "--prompts DIR/prompts.txt"),
        "no_answers": ("", "--no_answers"), "base_model": ("", "--base_model other"), "watch": ("", "--watch"),
        "every": ("--watch", "--every 2"), "port": ("--watch", "--port 9"),
        "trust_remote_code": ("", "--trust_remote_code"),
    },
    "chat": {
        "base": ("", "--base"), "compare": ("", "--compare"), "base_model": ("", "--base_model other"),
        "system": ("", "--system Hello"), "max_new_tokens": ("", "--max_new_tokens 3"),
        "temperature": ("", "--temperature 0.5"), "top_p": ("", "--top_p 0.5"), "seed": ("", "--seed 3"),
        "tools": ("", "--tools DIR/tools.json"), "chat_template_kwargs": ("", '--chat_template_kwargs {"a":1}'),
        "trust_remote_code": ("", "--trust_remote_code"), "verify_key": ("", "--verify_key K"), "json": ("", "--json"),
        "web": ("", "--web"),
        "host": ("--web", "--host 0.0.0.0"),
        "port": ("--web", "--port 9"),
    },
}  # fmt: skip
SHARED = {declared.name for group in (ModelArguments, DataArguments) for declared in fields(group)}
OF_THE_DOCTOR = dict.fromkeys(("json", "full", "write_env", "stage", "rehearse"))  # they need hosts: tests/hosts


@pytest.fixture
def verb(tiny_model, conversation_file, monkeypatch, tmp_path, capsys) -> Callable[..., Any]:
    """Calls a verb by its command line; what it says, and what it asks of what needs a model."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    previewed = ["--model_name_or_path", str(tiny_model), "--data_path", str(conversation_file)]
    (tmp_path / "prompts.txt").write_text("Who?\n")
    (tmp_path / "tools.json").write_text('[{"name": "f", "parameters": {}}]')
    (tmp_path / "recipe.yaml").write_text("model_max_length: 30\n")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/config.json").write_text("{}")

    def run(name: str, words: str) -> Any:
        calls = Calls()
        put_aside(name, calls, monkeypatch)
        first = {"preview": previewed, "quickstart": []}.get(name, ["output"])
        given = words.replace("DIR", str(tmp_path)).split()
        if given and name == "chat" and not given[0].startswith("-"):
            first = []
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n")))
        error = None
        try:
            cli.main([name, *first, *given])
        except FinetuneError as raised:
            error = raised
        return re.sub(r"0x\w+|[\d.]+ ?s(econds)?", "", f"{capsys.readouterr()}{calls}{error!r}")

    return run


def put_aside(verb: str, calls: Calls, monkeypatch: Any) -> None:
    """Leave out what needs a result or a model, and note how it is called."""
    result = SimpleNamespace(folder=Path("output"), run={}, base={"name": "base"}, chat={"stop_token_id": 2})
    result.adapter, result.base_path = "LORA", lambda name=None: Path("base")
    result.with_template_kwargs = lambda text: calls.to("with_template_kwargs", result)(text)
    at = f"finetune.cli.{verb}"
    found = {
        "preview": {"finetune.evaluation.benchmarks.use_cache": None},
        "evaluate": {
            f"{at}.read_result": result, f"{at}.eval_results.check_writable": None, f"{at}.find_local_sources": None,
            f"{at}.check_names": None,
            "finetune.evaluation.held_out.prepare_held_out": SimpleNamespace(sources=()),
            "finetune.evaluation.tool_calls.rows_with_tools": [],
            f"{at}.eval_results.versioned": {}, f"{at}.eval_results.write_results": None,
            f"{at}.print_sections": None, f"{at}.init_process_group": None,
            "finetune.inference.load_result.load_for_inference": SimpleNamespace(),
            "finetune.evaluation.held_out.evaluate_held_out": {},
            "finetune.evaluation.benchmarks.find_jobs": ["job"], f"{at}._fail_if_below": None,
            "finetune.evaluation.benchmarks.evaluate_benchmarks": {}, f"{at}.destroy_process_group": None,
            "finetune.evaluation.forgetting.evaluate_forgetting": {}, f"{at}.enable_gc": None,
            f"{at}.keep_freed_blocks": None, f"{at}.prepare_environment": None,
        },
        "merge": {
            f"{at}.read_result": result, "finetune.inference.load_result.load_tokenizer": None,
            "finetune.export.gguf_writer.check_gguf": None,
            "finetune.export.model_merge.plan_merge":
                SimpleNamespace(origin="x", tensors=[], size=0, source=None, tokenizer=None),
            "finetune.export.model_merge.merge_weights": SimpleNamespace(notes=[], size=0, checked="checked"),
            "finetune.export.gguf_writer.write_gguf": Path(__file__),
            "finetune.export.modelfile.write_modelfile": Path("Modelfile"),
        },
        "push": {
            "finetune.inference.run_result.read_result": result, f"{at}.upload": None,
            f"{at}.contents_of": {},
        },
        "quickstart": {
            f"{at}.obtain_model": None, f"{at}.train": None, f"{at}.read_result": None, f"{at}._answers": [],
            f"{at}.load_for_inference": SimpleNamespace(base=lambda: nullcontext(), tuned=None), f"{at}._show": 99,
        },
        "report": {
            f"{at}.read_run": SimpleNamespace(state="complete", answers=None, cards=[], folder=Path("f"), name="run"),
            f"{at}.write_report": None, f"{at}.keep_watching": None, f"{at}.check_replaceable": None,
            f"{at}.read_result": result, f"{at}.generate_answers": None, f"{at}.write_answers": None,
            f"{at}.prompts_of": ["prompt"],
        },
        "chat": {
            f"{at}.read_result": result, f"{at}.read_model": result, f"{at}.check_gradio": None,
            f"{at}.load_for_inference": SimpleNamespace(chat_format=None, stop_token_ids=[]), f"{at}.serve": None,
            f"{at}.answer_once": None, f"{at}.ChatModels": None,
        },
    }.get(verb, {})  # fmt: skip
    for name, returns in found.items():
        monkeypatch.setattr(name, calls.to(name.rpartition(".")[2], returns))
    if verb == "evaluate":
        monkeypatch.setattr(f"{at}.eval_results.SECTIONS", dict.fromkeys(evaluate.eval_results.SECTIONS, str))
    if verb == "chat":
        monkeypatch.setattr(f"{at}.ChatSession", lambda system, tools: f"chat with {system} {tools}")


@pytest.mark.parametrize(("name", "option"), [(verb, option) for verb, found in OF_VERBS.items() for option in found])
def test_an_option_of_a_verb_has_an_effect(name, option, verb, tmp_path):
    others, given = OF_VERBS[name][option]
    if option != "html":
        assert verb(name, f"{others} {given}") != verb(name, others)
        return
    verb(name, given)
    assert verb(name, given) != verb(name, others)


def test_every_option_of_every_verb_has_an_entry_and_a_help_text():
    assert {*OF_VERBS, "doctor", "launch", "train", "convert", "convert-config", "recipes"} == set(cli.VERBS)
    for name, entries in {**OF_VERBS, "doctor": OF_THE_DOCTOR}.items():
        actions = import_module(f"finetune.cli.{name}").build_parser()._actions
        left_out = {*SHARED, "help", "output"} - entries.keys()
        options = {action.dest: action.help for action in actions if action.dest not in left_out}
        assert options.keys() == entries.keys(), name
        assert all(options.values()), name


def test_every_flag_of_the_launcher_is_passed_on_or_read():
    text = "".join(path.read_text("utf-8") for path in (ROOT / "finetune").rglob("*.py"))
    types = build_parser().types
    assert len(types) > 20
    for name, shape in types.items():
        if name in NOT_PASSED_ON:
            read = re.search(rf"flags\.{name}\b|\bgiven\.get\(\"{name}\"", text)
            assert read or name == "force_multi", f"{name}; a host is reached over ssh unless it is this one"
            continue
        word = f"--{name}" if shape.kind is bool else f"--{name}={next(iter(shape.choices), '1')}"
        words = SupervisedRun(parse_launcher_args([word, "script.py"])).passed_on()
        assert word.replace("num_accelerators", "num_gpus") in words, name


def test_a_switch_in_front_of_a_positional_argument_takes_no_value():
    given = evaluate.build_parser().parse(["--no_base", "output", "--forgetting", "False", "--json"])
    assert given == {"no_base": True, "output": "output", "forgetting": False, "json": True}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mrege"], "unknown command mrege: did you mean merge?"),
        (["--json"], "unknown flag --json"),
        (["merge"], "missing: OUTPUT"),
        (["merge", "a", "b", "c"], "unexpected argument 'c'"),
        (["merge", "a", "--dtype", "int8"], "--dtype int8: expected bf16, fp16 or float32"),
        (["chat", "a", "--bse", "--temperature", "hot"], "--temperature hot: expected a number"),
        (["chat", "a", "--bse", "--temperature", "hot"], "did you mean --base?"),
    ],
)
def test_a_wrong_command_line_is_refused(words, said):
    with pytest.raises(ConfigError) as raised:
        cli.main(words)
    assert said in str(raised.value)


@pytest.mark.parametrize("typed", ["finetune ch", "finetune merge x --dt", "finetune launch --too_long "])
def test_the_shell_completes_verbs_flags_and_choices(typed, tmp_path, capsys):
    expected = {"ch": "chat", "--dt": "--dtype", "": "turns windows drop error"}
    words = typed.split(" ")
    script = tmp_path / "completion"
    with pytest.raises(SystemExit) as ended:
        cli.main(["--completion", "bash"])
    assert not ended.value.code
    script.write_text(capsys.readouterr().out)
    ask = 'source $0; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _finetune; echo "${COMPREPLY[@]}"'
    shown = subprocess.run(["bash", "-c", ask, script, *words], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == expected[words[-1]]
