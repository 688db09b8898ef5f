import dataclasses

import pytest

from finetune.cli import preview
from finetune.config import build_parser, parse
from finetune.config.argument_parser import NAMED, OBJECTS
from finetune.config.arguments import LOG_LEVELS, training_flags
from finetune.config.flag_support import REFUSED
from finetune.utils.errors import ConfigError
from tests.helpers.flag_parsing import PUBLISHED, REQUIRED, parsed, refusal

# ---- the published command


def test_the_published_command_parses():
    arguments = parse(PUBLISHED)

    assert arguments.model.model_name_or_path == "deeplang-ai/LingoWhale-8B"
    assert arguments.data.model_max_length == 2048
    assert arguments.adapter.kind() is None
    assert arguments.training == {
        "remove_unused_columns": False, "log_level_replica": "error", "logging_nan_inf_filter": False,
        "save_total_limit": 2, "output_dir": "output", "num_train_epochs": 4.0,
        "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "save_strategy": "epoch",
        "learning_rate": 2e-5, "lr_scheduler_type": "constant", "adam_beta1": 0.9, "adam_beta2": 0.98,
        "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "weight_decay": 1e-4, "warmup_steps": 0.0, "logging_steps": 1.0,
        "activation_checkpointing": True, "deepspeed": "ds_configs/zero3.json", "bf16": True, "tf32": True,
        "report_to": ["none"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "trusted"), [("deeplang-ai/LingoWhale-8B", True), ("someone/LingoWhale-8B", False), ("m", False)]
)
def test_only_the_published_model_runs_its_own_code_without_the_flag(name, trusted):
    words = [*REQUIRED, "--model_name_or_path", name]

    assert parse(words).model.trusts_code() is trusted
    assert not parse([*words, "--model_revision", "refs/pr/1"]).model.trusts_code()
    assert parse([*words, "--trust_remote_code", "True"]).model.trusts_code()


def test_a_folder_that_is_called_like_the_published_model_is_not_trusted(tmp_path, monkeypatch):
    (tmp_path / "deeplang-ai/LingoWhale-8B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    assert not parse([*REQUIRED, "--model_name_or_path", "deeplang-ai/LingoWhale-8B"]).model.trusts_code()


# ---- the flags of transformers


def test_names_and_defaults_are_those_of_the_installed_transformers():
    from transformers import TrainingArguments
    from transformers.training_args import trainer_log_levels

    real = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    read = {name: flag.default for name, flag in training_flags().items()}

    assert list(read) == list(real)
    compared = [name for name, default in read.items() if default is not None]
    assert len(compared) > 60
    assert [repr(read[name]) for name in compared] == [repr(real[name]) for name in compared]
    assert LOG_LEVELS == tuple(trainer_log_levels)
    computed = {name for name, default in real.items() if default is not None and read[name] is None}
    assert computed <= {"optim", "include_for_metrics"}


def test_every_flag_of_transformers_that_is_not_refused_is_accepted():
    samples = {bool: "True", int: "3", float: "0.5", str: "text"}
    values = {bool: True, int: 3, float: 0.5, str: "text"}
    left_out = {"local_rank", "output_dir", "fp16", *NAMED, *OBJECTS, *REFUSED}  # fp16: not beside bf16
    flags = [flag for flag in training_flags().values() if flag.name not in left_out]

    flags = [flag for flag in flags if not flag.shape.choices]
    training = parsed(*(word for flag in flags for word in (f"--{flag.name}", samples[flag.shape.kind]))).training

    assert len(flags) > 85
    old = {"gradient_checkpointing", "gradient_checkpointing_kwargs"}
    for flag in flags:
        if flag.name not in old:
            assert training[flag.name] == (
                [values[flag.shape.kind]] if flag.shape.is_list else values[flag.shape.kind]
            ), flag.name


def test_a_training_flag_that_is_not_given_has_the_default_of_transformers():
    assert parsed().given("learning_rate") == training_flags()["learning_rate"].default > 0
    assert parsed("--learning_rate", "0.5").given("learning_rate") == 0.5


def test_the_rank_that_the_launcher_passes_is_no_argument_of_the_run():
    assert parsed("--local_rank=1").flat() == parsed().flat()


@pytest.mark.parametrize(
    ("flag", "value", "now", "translated", "line"),
    [
        ("warmup_ratio", "0.1", "warmup_steps", 0.1, None),
        ("gradient_checkpointing", "True", "activation_checkpointing", True, None),
        ("gradient_checkpointing", "False", "activation_checkpointing", False, None),
        ("group_by_length", "True", "train_sampling_strategy", "group_by_length", "train_sampling_strategy"),
        ("group_by_length", "False", "train_sampling_strategy", "random", "train_sampling_strategy"),
        ("evaluation_strategy", "no", "eval_strategy", "no", "--evaluation_strategy is now --eval_strategy no"),
        ("no_cuda", "True", "use_cpu", True, "--no_cuda is now --use_cpu True"),
        ("per_gpu_train_batch_size", "4", "per_device_train_batch_size", 4, "per_device_train_batch_size 4"),
    ],
)
def test_a_renamed_flag_is_translated(flag, value, now, translated, line):
    arguments = parsed(f"--{flag}", value)

    assert arguments.training[now] == translated
    assert flag not in arguments.training
    assert len(arguments.notes) == (line is not None)
    assert line is None or line in arguments.notes[0]


def test_a_present_name_is_stronger_than_an_old_one_and_that_is_said():
    both = parsed("--warmup_ratio", "0.1", "--warmup_steps", "10")
    assert both.training["warmup_steps"] == 10
    assert both.notes == ["--warmup_ratio 0.1 is not used: --warmup_steps 10.0 is given too"]
    assert parsed("--gradient_checkpointing", "True", "--activation_checkpointing", "True").notes == []


@pytest.mark.parametrize("ratio", ["1", "1.5", "-0.1"])
def test_a_warmup_ratio_is_a_share(ratio):
    assert "expected a share from 0 up to 1" in refusal("--warmup_ratio", ratio)


# ---- what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--learning_rat", "1"], "unknown flag --learning_rat: did you mean --learning_rate?"),
        (["--learning_rat=1"], "unknown flag --learning_rat: did you mean --learning_rate?"),
        (["--data-path", "x"], "unknown flag --data-path: did you mean --data_path?"),
        (["--use_lra"], "unknown flag --use_lra: did you mean --use_lora"),
        (["--model_max", "5"], "unknown flag --model_max"),
        (["--zzz", "5"], "unknown flag --zzz: see finetune train --help"),
        (["stray"], "unexpected argument 'stray': --output_dir takes one value"),
        ([__file__], "a recipe ends with .yaml, .yml or .json"),
        (["qwen3_8b_lor"], "unexpected argument 'qwen3_8b_lor': did you mean the recipe qwen3_8b_lora?"),
        (["--learning_rate", "2e-4", "1e-4"], "unexpected argument '1e-4': --learning_rate takes one value"),
        (
            ["--output_dir=my", "output"],
            "unexpected argument 'output': --output_dir takes one value; quote a value that",
        ),
        (["\u2014seed", "1"], "\u2014seed: write the flag in ASCII characters: --seed"),
        (["\uff0d\uff0dseed\uff1d1"], "write the flag in ASCII characters: --seed=1"),
        (["--seed\uff1a1"], "write the flag in ASCII characters: --seed=1"),
        (["\u2013seed", "1"], "unknown flag \u2013seed: did you mean --seed?"),
        (["\u2014sead", "1"], "unknown flag \u2014sead: did you mean --seed?"),
        (
            ["--use_lora", "--modules_to_save", "lm_head,embed_tokens"],
            "write names with spaces between them: lm_head embed_tokens",
        ),
        (["--freeze", "embed_tokens\uff0clayers.0-3"], "write names with spaces between them: embed_tokens layers.0-3"),
        (["--lora_r", "eight"], "--lora_r eight: expected a whole number"),
        (["--learning_rate", "fast"], "--learning_rate fast: expected a number"),
        (
            ["--warmup_ratio", "3%", "--learning_rate", "1,5e-4"],
            "--learning_rate 1,5e-4: expected a number such as 0.5",
        ),
        (["--lr_scheduler_kwargs", "{bad}"], '--lr_scheduler_kwargs {bad}: expected a JSON object such as {"name": 1}'),
        (["--adam_beta2", "1"], "--adam_beta2 1.0: expected a share from 0 up to 1"),
        (["--lora_alpha", "-1", "--use_lora"], "--lora_alpha -1: expected more than 0"),
        (["--preprocessing_num_workers", "100000"], "--preprocessing_num_workers 100000: expected at most 1024"),
        (["--log_level", "loud"], "--log_level loud: expected detail, debug, info"),
        (["--optim", "adamw"], "--optim adamw: did you mean adamw_torch?"),
        (["--weight_decay", "nan", "--max_grad_norm", "inf"], "--weight_decay nan: expected a finite number"),
        (["--bf16", "maybe"], "--bf16 maybe: expected True or False"),
        (["--adapter", "ia3"], "--adapter ia3: expected lora, prefix or prompt"),
        (["--seed"], "--seed: expected one argument"),
        (["--use_lora", "True", "--adapter", "prefix"], "--use_lora True and --adapter prefix exclude each other"),
        (["--bf16", "--fp16", "True"], "--bf16 and --fp16 exclude each other"),
        (["--load_in_4bit", "--load_in_8bit"], "--load_in_4bit and --load_in_8bit exclude each other"),
        (["--sequence_parallel_size", "2", "--validation_share", "0.1"], "--sequence_parallel_size 2: held-out"),
        (["--use_lora", "--adapter", "prompt"], "--use_lora True and --adapter prompt exclude each other"),
        (
            ["--use_lora", "--use_dora", "--init_lora_weights", "pissa_niter_16"],
            "--use_dora True and --init_lora_weights pissa_niter_16 exclude each other",
        ),
        (["--model_max_length", "0"], "--model_max_length 0: expected at least 1"),
        (["--max_steps", "0"], "--max_steps 0: no step would be made: expected at least 1, or -1"),
        (["--max_dropped_rows", "1.5"], "--max_dropped_rows 1.5: expected a share from 0 to 1"),
        (["--validation_share", "1"], "--validation_share 1.0: expected a share from 0 up to 1"),
        (["--validation_share", "0.1", "--eval_data_path", "e"], "--validation_share and --eval_data_path exclude"),
        (["--chat_template_kwargs", "[]"], "--chat_template_kwargs []: expected a JSON object"),
        (["--chat_template_kwargs", '{"tools": []}'], "--chat_template_kwargs: tools is no variable of chat templates"),
        (["--repairs", "spelling"], "--repairs spelling: expected "),
        (["--columns", "question"], "--columns question: expected KEY=COLUMN with a key that is read"),
        (["--columns", "question=a", "question=b"], "--columns question=a: question is named twice: keep one"),
        (
            ["--tokens_per_device_batch", "9", "--batching", "packed"],
            "--tokens_per_device_batch and --batching packed exclude each other",
        ),
        (["--lora_r", "0"], "--lora_r 0: expected at least 1"),
        (["--num_virtual_tokens", "-1"], "--num_virtual_tokens -1: expected at least 1"),
        (["--lora_dropout", "1"], "--lora_dropout 1.0: expected a share from 0 up to 1"),
        (["--lora_dropout", "nan"], "--lora_dropout nan: expected a finite number"),
        (["--optim", "adamw_trch"], "--optim adamw_trch: did you mean adamw_torch?"),
        (["--save_strategy", "x"], "--save_strategy x: expected no, steps, epoch or best"),
        (["--lora_r", "8"], "--lora_r is given, but all parameters would be trained"),
        (["--lora_r", "16"], "--lora_r is given, but all parameters would be trained: add --use_lora True, or leave"),
        (["--adapter", "prefix", "--use_dora"], "--use_dora is given, but a prefix adapter would be trained"),
        (
            ["--use_lora", "--num_virtual_tokens", "9"],
            "--num_virtual_tokens is given, but a lora adapter would be trained: add --adapter prefix or prompt",
        ),
    ],
)
def test_a_wrong_flag_is_named_with_its_value(words, said):
    assert said in refusal(*words)


def test_a_value_may_hold_any_characters():
    wide = "\u2014a\uff1a1"
    given = parsed("--run_name", wide, f"--hub_revision={wide}").training

    assert given["run_name"] == given["hub_revision"] == wide


def test_all_faults_are_named_at_once():
    message = refusal("--learning_rat", "1", "--use_lra", "--seed", "x", "--bf16", "maybe")
    for said in ("4 faults", "--learning_rate?", "--use_lora", "--seed x:", "--bf16 maybe:"):
        assert said in message
    message = refusal("--lora_dropout", "2", "--model_max_length", "0", "--learning_rate", "0")
    for said in ("--lora_dropout 2.0", "--model_max_length 0", "--learning_rate 0"):
        assert said in message


def test_every_missing_flag_is_named_at_once():
    with pytest.raises(ConfigError) as raised:
        parse([])
    assert str(raised.value) == "missing: --model_name_or_path, --data_path, --output_dir"
    with pytest.raises(ConfigError, match="^missing: --data_path$"):
        parse(["--model_name_or_path", "m", "--output_dir", "o", "--data_path", ""])


@pytest.mark.parametrize(
    "words", [["--use_lora"], ["--use_lora", "--seed", "1"], ["--use_lora", "true"], ["--use_lora=1"]]
)
def test_a_bare_switch_means_true(words):
    arguments = parsed(*words)

    assert arguments.adapter.use_lora is True
    assert arguments.adapter.kind() == "lora"


@pytest.mark.parametrize("word", ["False", "false", "no", "0"])
def test_a_switch_can_be_off(word):
    assert parsed("--use_lora", word).adapter.kind() is None
    assert parsed("--use_lora", word, "--adapter", "prefix").adapter.kind() == "prefix"


def test_lora_may_be_asked_for_twice():
    assert parsed("--use_lora", "--adapter", "lora").adapter.kind() == "lora"


def test_help_names_every_flag_and_exits_with_0(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])

    shown = set(capsys.readouterr().out.replace(",", " ").split())
    assert ended.value.code == 0
    names = build_parser().types
    assert len(names) > 130
    assert [name for name in names if f"--{name}" not in shown] == []


def test_a_home_folder_is_found_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/nori")
    assert parsed("--model_name_or_path=~/model").model.model_name_or_path == "/home/nori/model"


# ---- preview


def test_preview_takes_the_flags_of_model_and_data():
    words = ["--model_name_or_path", "m", "--data_path", "d", "--model_max_length", "8", "--json"]

    model, data, shown = preview.parse_options(words)

    assert (model.model_name_or_path, data.data_path, data.model_max_length, shown.json) == ("m", ["d"], 8, True)
    assert preview.parse_options(words[:-1])[2].json is False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "missing: --model_name_or_path, --data_path"),
        (["--model_name_or_path", "m", "--data_path", "d", "--jsn"], "unknown flag --jsn: did you mean --json?"),
        (["--model_name_or_path", "m", "--data_path", "d", "--model_max_length", "0"], "expected at least 1"),
    ],
)
def test_preview_refuses_as_training_does(words, said):
    with pytest.raises(ConfigError) as raised:
        preview.parse_options(words)

    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--learning_rate", "0"), "--learning_rate 0: no weight would change"),
        (("--learning_rate", "-0.001"), "--learning_rate -0.001: no weight would change"),
        (("--learning_rate", "nan"), "--learning_rate nan: expected a finite number"),
        (("--num_train_epochs", "0"), "--num_train_epochs 0: no step would be made"),
    ],
)
def test_a_run_that_could_learn_nothing_does_not_start(flags, says):
    base = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o"]
    with pytest.raises(ConfigError) as raised:
        parse([*base, *flags])
    assert says in str(raised.value)
    assert parse([*base, "--num_train_epochs", "0", "--max_steps", "3"]).given("max_steps") == 3
