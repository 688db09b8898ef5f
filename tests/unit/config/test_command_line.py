"""What is typed behind `finetune train`: a recipe, flags in two spellings, flags of the launcher, foreign names."""

from pathlib import Path

import pytest

from finetune import cli
from finetune.cli import train
from finetune.cli.launch import is_ours
from finetune.config import build_parser, parse
from finetune.config.foreign_names import FOREIGN_NAMES, RENAMED
from finetune.utils.errors import ConfigError
from finetune.utils.options import HELP_WIDTH
from tests.helpers.flag_parsing import REQUIRED, refusal


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("model_name_or_path: m\ndata_path: [d.json]\noutput_dir: o\nseed: 3\nlora_r: 4\n")
    return "a.yaml"


@pytest.mark.parametrize(
    "words",
    [
        "a.yaml --use_lora seed=5 --num_gpus 2",
        "--num_gpus=2 --use_lora a.yaml --seed 5",
        "use_lora=yes num_gpus=2 seed=5 a.yaml",
        "--num_gpus 2 finetune/finetune.py --config a.yaml --use_lora --seed=5",
    ],
)
def test_a_recipe_and_flags_stand_in_any_order(recipe, words):
    flags = train.parse_options(words.split())
    arguments = parse(flags.script_args)
    assert is_ours(flags) and flags.num_gpus == 2
    assert arguments.training["seed"] == 5  # the command line wins
    assert arguments.adapter.use_lora and arguments.adapter.lora_r == 4


def test_values_that_look_like_flags_stay_values():
    words = ["--run_name", "seed=5", "--columns", "question=Q", "answer=A", "data_path=b.json", "c.json", "--bf16"]
    arguments = parse([*REQUIRED, *words])
    assert arguments.training["run_name"] == "seed=5" and arguments.training["bf16"] is True
    assert arguments.data.columns == ["question=Q", "answer=A"] and arguments.data.data_path == ["b.json", "c.json"]


@pytest.mark.parametrize("words", ["a.yaml --hostfile --use_lora", "--seed 3 --num_gpus"])
def test_a_flag_of_the_launcher_takes_no_flag_for_its_value(recipe, words):
    with pytest.raises(ConfigError, match="--(hostfile|num_gpus): a value is missing behind it"):
        train.parse_options(words.split())
    assert train.parse_options(["a.yaml", "--hostfile", ""]).hostfile == ""


@pytest.mark.parametrize("words", ["--data_path a --seed 3 --data_path b", "data_path=a data_path=b"])
def test_a_list_that_is_given_twice_is_noted(recipe, words):
    found = parse(["a.yaml", "--use_lora", *words.split()])
    assert found.data.data_path == ["b"] and "--data_path is given twice: the last one counts" in found.notes[-1]
    assert parse(["a.yaml", "--use_lora", "data_path=a", "seed=1", "seed=2"]).notes == []


def test_a_second_recipe_is_refused(recipe):
    with pytest.raises(ConfigError, match="a.yaml and b.yaml"):
        parse(["--config", "a.yaml", "--config", "b.yaml"])
    with pytest.raises(ConfigError, match="a.yaml and b.yaml"):
        parse(["a.yaml", "b.yaml"])


def test_faults_of_recipe_and_command_are_named_at_once(recipe):
    Path("a.yaml").write_text("lora_rank: 4\ncutoff_len: 512\n")
    with pytest.raises(ConfigError) as raised:
        parse(["a.yaml", "--learning_rat", "3", "--num_gpu=2", "micro_batch_size=4"])
    for said in (
        "a.yaml: unknown flag --lora_rank: here --lora_r",
        "a.yaml: unknown flag --cutoff_len: here --model_max_length",
        "unknown flag --learning_rat: did you mean --learning_rate?",
        "did you mean --num_gpus",
        "unknown flag --micro_batch_size: here --per_device_train_batch_size",
        "missing: --model_name_or_path, --data_path, --output_dir",
    ):
        assert said in str(raised.value)


def test_what_follows_an_unknown_flag_is_no_recipe(recipe):
    said = refusal("--model", "m", "--dataset", "a.yaml")
    assert "unknown flag --model" in said and "unknown flag --dataset" in said and "--config" not in said


def test_a_flag_of_the_launcher_behind_the_script_is_told():
    assert "--num_gpus: a flag of the launcher" in refusal("--num_gpus", "2")


def test_foreign_names_lead_to_flags_that_exist():
    known = set(build_parser().types)
    assert set(RENAMED) <= known and not set(FOREIGN_NAMES) & known
    named = [word.strip("`,;:") for remedy in FOREIGN_NAMES.values() for word in remedy.split() if word[:2] == "--"]
    assert len(named) > 60 and {word[2:] for word in named} <= known


def test_the_help_names_recipe_and_launcher():
    text = " ".join(build_parser().format_help().split())
    assert "[RECIPE.yaml]" in text and "--num_gpus N" in text


def test_no_line_of_a_help_is_wider_than_a_terminal():
    parsers = [cli.build_parser(), *(parser for verb in cli.VERBS for parser in cli._parsers(verb))]
    lines = [line for parser in parsers for line in parser.format_help().splitlines()]
    assert len(lines) > 500 and [line for line in lines if len(line) > HELP_WIDTH] == []
