"""What the verbs say of everyday mistakes before they load a model."""

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.export.gguf_writer import TYPES
from finetune.inference.run_result import RunResult
from finetune.utils.errors import ConfigError, DataError, StorageError


@pytest.fixture
def result(tmp_path, monkeypatch):
    """The working directory holds a result without a model, a folder with a file, and a file."""
    monkeypatch.chdir(tmp_path)
    for name in ("result", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "result/run.json").write_text("{}")
    (tmp_path / "full/mine").write_text("mine")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}')
    (tmp_path / "array.json").write_text('[{"text": "a"}]')


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("chat result --web --port 99999", "--port 99999: expected 1 to 65535"),
        ("chat result --web --port 0", "--port 0: expected 1 to 65535"),
        ("report result --watch --port -1", "--port -1: expected 0 to 65535"),
        (
            "chat --model_name_or_path result",
            "unknown flag --model_name_or_path: the folder stands without a flag, as OUTP",
        ),
        ("evaluate result --output_dir x", "unknown flag --output_dir: the folder stands without a flag, as OUTPUT"),
        ("launch rows.json", "SCRIPT rows.json: there is no such file: did you mean rows.jsonl?"),
        ("launch --module no_such.module", "--module no_such.module: there is no such module here, nor in "),
        ("preview --model_name_or_path m --data_path rows.jsonl --rows 3 -1", "--rows -1: expected 0 or more"),
        (
            "recipes qwen3_8b_lora full",
            "full: a recipe ends with .yaml: name the file, such as full/qwen3_",
        ),
        ("recipes qwen3_8b_lora none/", "such as none/qwen3_8b_lora.yaml"),
        ("chat full", "full: holds no run.json and no model: give the output_dir of a run, or a chat model"),
        ("chat result --tools none.json", "--tools none.json: there is no such file"),
        ("quickstart --output_dir rows.jsonl", "--output_dir rows.jsonl: is a file: name a folder"),
        ("preview array.json", "--config array.json: expected a mapping of flags to values: a file of conversations"),
        ("evaluate result --forgetting --limit 2", "--limit is about --tasks: give it too"),
        ("evaluate result --tasks t --too_long drop --worst 3", "--too_long is about --data_path: give it too"),
        ("evaluate result --jsn", "unknown flag --jsn: did you mean --json?"),
        ("recipes qwen3_8b_lora none/a.yaml", "none/a.yaml: there is no folder none: make it first"),
        ("merge result a b", "unexpected argument 'b': usage: finetune merge OUTPUT [DIR]"),
        ("merge result out --dtype bf16 fp16", "unexpected argument 'fp16': --dtype takes one value"),
        ("merge result out --gguf q9", "--gguf q9: expected f32, f16, bf16, q8_0"),
        (
            "preview --model_name_or_path rows.jsonl --data_path rows.jsonl",
            "rows.jsonl: is a file: give the folder that",
        ),
        ("preview --model_name_or_path ./rsult --data_path rows.jsonl", "no such folder: did you mean result?"),
        (
            "preview --model_name_or_path a/b --data_path rows.jsonl --chat_template rows.jinja",
            "--chat_template rows.jinja: expected lingowhale, chatml, hermes or a Jinja file: ",
        ),
    ],
)
def test_a_mistake_is_named_with_value_and_remedy(command, said, result):
    verb, *words = command.split()
    with pytest.raises(ConfigError) as refused:
        import_module(f"finetune.cli.{verb}").main(words)
    assert said in str(refused.value)


def test_a_flag_of_the_doctor_is_near_too(result, capsys):
    from finetune.cli.doctor import main

    with pytest.raises(SystemExit, match="2"):
        main(["--rehearze"])
    assert "unknown flag --rehearze: did you mean --rehearse?" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["merge result out", "evaluate result --forgetting", "chat result"])
def test_a_base_that_is_gone_is_said_before_anything_loads(words, result, tmp_path, monkeypatch):
    verb, *rest = words.split()
    module = import_module(f"finetune.cli.{verb}")
    made = RunResult(tmp_path, {"model": {"folder": "none", "name": "m"}}, "LORA")
    monkeypatch.setattr(module, "read_result", lambda folder, **_: made)
    with pytest.raises(ConfigError, match="its base none does not exist: give its folder with --base_model"):
        module.main(rest)
    with pytest.raises(ConfigError, match="its base moved does not exist"):
        module.main([*rest, "--base_model", "moved"])


def test_a_model_that_cannot_be_kept_is_said_with_its_folder(result):
    from finetune.cli.quickstart import obtain_model

    with pytest.raises(StorageError, match="--model_dir rows.jsonl/model: .*rows.jsonl is a file, not a folder"):
        obtain_model(Path("rows.jsonl/model"))


@pytest.mark.parametrize(("of_the_run", "status"), [(6, 6), (75, 75), (-9, 137)])
def test_the_quickstart_ends_with_the_status_of_its_run(of_the_run, status, monkeypatch):
    from finetune.cli import quickstart

    monkeypatch.setattr(quickstart.subprocess, "run", lambda command: SimpleNamespace(returncode=of_the_run))
    with pytest.raises(SystemExit) as ended:
        quickstart.train(quickstart.QuickstartOptions(), Path("data.json"))
    assert ended.value.code == status


def test_a_folder_that_holds_something_is_not_replaced_by_a_merge(result, tmp_path, monkeypatch):
    from finetune.cli import merge

    made = RunResult(tmp_path, {"model": {"folder": "none", "name": "m"}}, None)
    monkeypatch.setattr(merge, "read_result", lambda folder, **_: made)
    with pytest.raises(ConfigError, match="rows.jsonl is a file, not a folder"):
        merge.main(["result", "rows.jsonl/out"])
    with pytest.raises(ConfigError, match="full: exists and is not replaced"):
        merge.main(["result", "full"])
    with pytest.raises(ConfigError, match="rows.jsonl: exists and is not replaced"):
        merge.main(["result", "rows.jsonl"])


def test_held_out_rows_are_looked_for_before_anything_loads(result, monkeypatch):
    from finetune.cli import evaluate

    made = SimpleNamespace(with_template_kwargs=lambda _: None)
    monkeypatch.setattr(evaluate, "read_result", lambda folder, **_: made)
    with pytest.raises(DataError, match="rows.json: there is no such file: did you mean rows.jsonl?"):
        evaluate.main(["result", "--data_path", "rows.json"])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("hellaswga,gsm8k rows.jsonl", "--tasks hellaswga: lm-eval knows no such task: did you mean hellaswag?"),
        ("sums.yaml", "--tasks sums.yaml: there is no such file"),
        (",", "--tasks names no task"),
    ],
)
def test_names_of_tasks_are_looked_up_before_anything_loads(names, said, result, monkeypatch):
    from finetune.cli import evaluate

    made = SimpleNamespace(with_template_kwargs=lambda _: None)
    monkeypatch.setattr(evaluate, "read_result", lambda folder, **_: made)
    with pytest.raises(ConfigError) as refused:
        evaluate.main(["result", "--tasks", *names.split()])
    assert str(refused.value).startswith(said)


def test_the_types_of_gguf_are_those_that_are_written():
    from finetune.cli.merge import build_parser

    assert build_parser().types["gguf"].choices == tuple(TYPES)
