"""Flags from a file: --config with YAML, JSON, or the run.json of an earlier run."""

import json
from pathlib import Path

import pytest
import yaml

from finetune.config import parse
from finetune.config.recipes import find_recipe
from tests.helpers.flag_parsing import PUBLISHED, REQUIRED, parsed, refusal

VALUES = {"learning_rate": 2e-5, "use_lora": True, "lora_target_modules": ["q_proj", "v_proj"], "report_to": "none"}


def written(path: Path, values: object) -> Path:
    """A config file in the format of its name; text and bytes as they are."""
    if isinstance(values, bytes):
        path.write_bytes(values)
    elif isinstance(values, str):
        path.write_text(values, encoding="utf-8")
    else:
        path.write_text(json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.yaml", "a.yml", "a.json", "run.json"])
def test_a_config_file_gives_flags(name, tmp_path):
    values = {"arguments": VALUES, "world_size": 2} if name == "run.json" else VALUES

    arguments = parsed("--config", str(written(tmp_path / name, values)))

    assert arguments.flat() == {**parsed().flat(), **VALUES, "report_to": ["none"]}


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path):
    text = "learning_rate: 2e-5\nnum_train_epochs: 4\nbf16: yes\nlr_scheduler_kwargs: {a: 1}\n"
    path = written(tmp_path / "a.yaml", text)

    training = parsed("--config", str(path)).training

    assert (training["learning_rate"], training["num_train_epochs"], training["bf16"]) == (2e-5, 4.0, True)
    assert json.loads(training["lr_scheduler_kwargs"]) == {"a": 1}


def test_yaml_words_that_mean_no_are_the_choice_of_that_name(tmp_path):
    path = written(tmp_path / "a.yaml", "save_strategy: no\neval_strategy: off\nlogging_strategy: 'no'\nbf16: off\n")

    training = parsed("--config", str(path)).training

    assert [training[f"{kind}_strategy"] for kind in ("save", "eval", "logging")] == ["no"] * 3
    assert training["bf16"] is False


def test_a_config_file_may_hold_the_required_flags(tmp_path):
    path = written(tmp_path / "a.json", {"model_name_or_path": "m", "data_path": "d", "output_dir": "o"})

    assert parse(["--config", str(path)]).training["output_dir"] == "o"


def test_the_command_line_wins_over_the_file(tmp_path):
    path = written(tmp_path / "a.yaml", {**VALUES, "data_path": "other.json", "lora_r": 64})

    words = "--learning_rate 1 --use_lora False --lora_target_modules k".split()
    arguments = parsed("--config", str(path), *words)

    assert arguments.data.data_path == ["d.json"]
    assert arguments.training["learning_rate"] == 1.0
    assert (arguments.adapter.use_lora, arguments.adapter.lora_r) == (False, 64)
    assert arguments.adapter.lora_target_modules == ["k"]


@pytest.mark.parametrize(
    ("stored", "words", "name", "value"),
    [
        ({"activation_checkpointing": True}, ["--gradient_checkpointing", "False"], "activation_checkpointing", False),
        ({"warmup_steps": 0.5}, ["--warmup_ratio", "0.1"], "warmup_steps", 0.1),
        ({"warmup_ratio": 0.5}, ["--warmup_steps", "10"], "warmup_steps", 10.0),
        ({"use_cpu": False}, ["--no_cuda", "True"], "use_cpu", True),
    ],
)
def test_the_command_line_wins_under_a_flag_s_old_name_too(stored, words, name, value, tmp_path):
    """A run.json holds the present names; the published command uses the old ones."""
    path = written(tmp_path / "run.json", {"arguments": stored})

    assert parsed("--config", str(path), *words).training[name] == value


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.yaml", {"learning_rat": 1}, "unknown flag --learning_rat: did you mean --learning_rate?"),
        ("a.yaml", "{1: 2}", "unknown flag --1"),
        ("a.yaml", "seed: 1\nseed: 2", "seed is given twice"),
        ("a.json", '{"seed": 1, "seed": 2}', 'the key "seed" is given twice'),
        ("a.yaml", "lora: {lora_r: 8}", "lora: a recipe has no sections: write lora_r without it"),
        ("a.yaml", "run_name: my: run", "a value that has a colon stands in quotes"),
        ("a.yaml", "seed: 1\n---\nseed: 2", "leave the line --- out"),
        ("a.json", {"lora_r": "eight"}, "--lora_r 'eight': expected a whole number"),
        ("a.json", {"seed": True}, "--seed True: expected a whole number"),
        ("a.json", {"output_dir": ["a", "b"]}, "output_dir"),
        ("a.json", "[1]", "expected a mapping of flags to values"),
        ("a.yaml", "", "expected a mapping of flags to values"),
        ("a.yaml", "a: [", "line 1, column 5: not YAML: "),
        ("a.yaml", "seed: 1\n\tbf16: true", "line 2, column 1: not YAML: found character '\\t' that cannot start any "
         "token: indent with spaces, not tabs"),
        ("a.yaml", "seed\uff1a 1\nbf16: true", "line 2, column 5: not YAML: mapping values are not allowed here: "
         "write a key, an ASCII colon, a space"),
        ("a.yaml", "seed\uff1a 1", "expected a mapping of flags to values: write a key, an ASCII colon"),
        ("a.yaml", "run_name: 2020-13-45", "month"),
        ("a.json", "{,}", "line 1, column 2: not JSON"),
        ("a.yaml", b"run_name: \xe9", "UTF-8"),
        ("a.json", b'{"run_name": "\xe9"}', "UTF-8"),
        ("a.json", "[" * 100_000, ""),
        ("a.yaml", "[" * 5_000, ""),
        ("a.json", '{"seed": ' + "1" * 5_000 + "}", "digits"),
    ],
    ids=[
        "unknown", "number-as-flag", "twice", "twice-json", "section", "colon", "documents", "type",
        "boolean-for-int", "list-for-one", "array", "empty", "broken-yaml", "tab", "wide-colon", "wide-colons",
        "bad-date", "broken-json", "latin-1-yaml", "latin-1-json", "deep-json",
        "deep-yaml", "digits",
    ],
)  # fmt: skip
def test_a_wrong_config_file_is_named_with_what_is_wrong(name, content, said, tmp_path):
    path = written(tmp_path / name, content)

    message = refusal("--config", str(path))

    assert message.startswith(f"--config {path}")
    assert said in message


def test_unknown_names_in_a_section_are_named_with_it(tmp_path):
    message = refusal("--config", str(written(tmp_path / "a.yaml", "lora: {rank: 8, lora_r: 8}")))

    assert "lora: a recipe has no sections" in message and "unknown flag --rank: here --lora_r" in message
    assert "--lora_r:" not in message


def test_a_missing_config_file_is_named(tmp_path):
    missing = tmp_path / "no.yaml"

    written(tmp_path / "now.yaml", {})
    near = f": did you mean {tmp_path / 'now.yaml'}?"
    assert refusal("--config", str(missing)) == f"--config {missing}: there is no such file{near}"
    assert refusal("--config", str(tmp_path)).startswith(f"--config {tmp_path}: ")


def test_a_run_json_of_anyone_does_not_decide_whose_code_runs(tmp_path):
    values = {"trust_remote_code": True, "model_name_or_path": "m"}
    recipe, run = written(tmp_path / "recipe.json", values), written(tmp_path / "run.json", {"arguments": values})

    assert parsed("--config", str(recipe)).model.trusts_code()
    assert not parsed("--config", str(run)).model.trusts_code()


@pytest.mark.parametrize("name", ["run.json", "run.yaml"])
@pytest.mark.parametrize(
    "words",
    [
        PUBLISHED,
        [*REQUIRED, "--use_lora", "--lora_target_modules", "q_proj", "v_proj", "--lora_r", "4", "--new_tokens", "<x>"],
        [*REQUIRED, "--lr_scheduler_kwargs", '{"a": [1, "b c"]}', "--run_name", "", "--chat_template", "a b.jinja"],
        [*REQUIRED, "--no_cuda", "--group_by_length", "False", "--warmup_ratio", "0.25", "--tf32", "False"],
        [*REQUIRED, "--use_lora", "--new_tokens", "--human_token_ids", "--modules_to_save", "lm_head"],
        [*REQUIRED, "--run_name=-first", "--output_dir=--o", "--neftune_noise_alpha=-1e-05"],
        [*REQUIRED, "--new_tokens=-x"],
    ],
    ids=["published", "lora", "text", "translated", "empty-lists", "leading-dashes", "leading-dash-in-list"],
)
def test_a_run_is_repeated_by_its_own_file(words, name, tmp_path):
    arguments = parse(words)

    again = parse(["--config", str(written(tmp_path / name, {"arguments": arguments.flat()}))])

    assert again.flat() == arguments.flat()
    assert len(again.flat()) > 20


def test_a_shipped_recipe_brings_its_data_to_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = str(find_recipe("cpu_rehearsal"))
    (shipped,) = parse(["--config", recipe]).data.data_path
    assert Path(shipped).is_absolute() and Path(shipped).is_file()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/identity.json").write_text("[]")
    assert parse(["--config", recipe]).data.data_path == ["data/identity.json"]
    (tmp_path / "own.yaml").write_text((tmp_path / recipe).read_text())
    (tmp_path / "data/identity.json").unlink()
    assert parse(["--config", "own.yaml"]).data.data_path == ["data/identity.json"]
