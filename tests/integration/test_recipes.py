"""The shipped recipes: flags, commands in comments, what the doctor foresees for the hardware that they name.

The published configs of their models lie in `tests/golden/model_configs`, in a cache of the hub for these tests.
LingoWhale-8B's code is not here: the sizes of Llama 3.1 8B stand in for its own, as the recipe says.
"""

import json
import math
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import constants

from finetune.cli import doctor, preview
from finetune.cli import recipes as recipes_verb
from finetune.cli import train as train_verb
from finetune.config import flag_words, parse
from finetune.config.hardware import DetectedHardware, Gpu
from finetune.config.recipes import shipped_recipes
from finetune.config.run_config import RankCounts
from finetune.distributed.process_setup import prepare_environment
from finetune.models.attention import unsupported_config_reason
from finetune.preflight.doctor_report import DoctorReport
from finetune.preflight.dry_run import make_random_model
from finetune.preflight.resource_checks import FreeSpace, check_resources, forecast_batches, run_spec
from finetune.train import resolve
from finetune.utils.errors import ConfigError
from tests.helpers import ranks
from tests.helpers.paths import ROOT
from tests.helpers.tiers import mostly_slow

RECIPES = shipped_recipes()
CONFIGS = ROOT / "tests/golden/model_configs"
STAND_INS = {"LingoWhale-8B": "Llama-3.1-8B-Instruct"}
COMMIT = "0" * 40
FORESEEN = re.compile(
    r"^# Foreseen by finetune doctor: (\d+) of (\d+) GB on (?:each of (?:(\d+) x )?)?(\d+) (GPU|CPU)s?\b", re.MULTILINE
)
REHEARSED = (
    "gemma3_4b_lora", "gpt_oss_20b_lora", "llama33_70b_full_4hosts", "long_context_32k", "mistral_7b_lora",
    "qwen3_30b_a3b_lora", "qwen3_8b_24gb",
)  # fmt: skip
LONGEST_LINE = 120
FAST = ("cpu_rehearsal", "llama33_70b_full_4hosts")
ROOM = 0.9  # of a card, and of the host's memory: twice that of its cards


@dataclass(frozen=True)
class Foreseen:
    """What the comment of a recipe says."""

    needed: int
    card: int
    hosts: int
    per_host: int
    device: str


def foreseen(path: Path) -> Foreseen:
    needed, card, hosts, per_host, device = FORESEEN.search(path.read_text()).groups()
    return Foreseen(int(needed), int(card), int(hosts or 1), int(per_host), device)


def commands(path: Path) -> list[list[str]]:
    """The commands in the comments of a recipe."""
    return [shlex.split(line, comments=True) for line in re.findall(r"^#     (.+)$", path.read_text(), re.MULTILINE)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A cache of the hub that holds the configs of all models."""
    cache = tmp_path_factory.mktemp("hub")
    for path in RECIPES.values():
        name = yaml.safe_load(path.read_text())["model_name_or_path"]
        if not name.startswith("."):
            short = name.partition("/")[2]
            snapshot = cache / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT
            snapshot.mkdir(parents=True, exist_ok=True)
            (snapshot.parents[1] / "refs").mkdir(exist_ok=True)
            (snapshot.parents[1] / "refs/main").write_text(COMMIT)
            shutil.copy(CONFIGS / f"{STAND_INS.get(short, short)}.json", snapshot / "config.json")
    return cache


@pytest.mark.parametrize("path", RECIPES.values(), ids=RECIPES)
def test_comments_are_commands_that_parse(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    parsed = 0
    for words in commands(path):
        verb = " ".join(words[:2])
        if words[0] == "sbatch":
            script = next(n for n, word in enumerate(words) if word.endswith(".sbatch"))
            assert (ROOT / words[script]).is_file()
            words, verb = ["finetune", "train", *words[script + 1 :]], "finetune train"
        if verb == "finetune train":
            arguments = parse(train_verb.parse_options(words[2:]).script_args)
            assert arguments.run.config == str(path.relative_to(ROOT))
            parsed += 1
        elif verb == "finetune doctor":
            assert parse(doctor.parse_options(words[2:])[2]).run.config == str(path.relative_to(ROOT))
        elif verb == "finetune preview":
            preview.parse_options(words[2:])
        else:
            assert verb in ("finetune evaluate", "pip install")
    assert parsed == 1
    assert all(len(line) <= LONGEST_LINE for line in path.read_text().splitlines())


@pytest.mark.parametrize("path", mostly_slow(RECIPES.values(), fast=[RECIPES[name] for name in FAST]), ids=RECIPES)
def test_the_doctor_foresees_what_the_comment_says(path, hub, tmp_path, monkeypatch, golden_tokenizer):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.chdir(ROOT)
    prepare_environment()
    said = foreseen(path)
    arguments = parse(["--config", str(path), "--output_dir", str(tmp_path / "output")])
    gpus = (Gpu("NVIDIA H100 80GB HBM3", (9, 0)),) * said.per_host if said.device == "GPU" else ()
    config, info = resolve(arguments, DetectedHardware(gpus), RankCounts(said.hosts * said.per_host, said.per_host))
    batches = forecast_batches(
        config.batch, config.schedule, conversations_of_full_length(config),
        obstacle=unsupported_config_reason(info.config, config.data.model_max_length),
    )  # fmt: skip
    run = run_spec(config, batches, ranks_on_host=said.per_host)
    report = DoctorReport()
    card = said.card * 1e9 * ROOM
    free = FreeSpace(card if gpus else math.inf, (2 if gpus else 1) * said.per_host * card, {})
    check_resources(report, run, batches.first, free, info, golden_tokenizer, config.adapter)

    assert report.findings == []
    assert " free" not in str(report.facts["memory"]["lines"])  # where no host has answered
    assert batches.layout.batching == "flat" and batches.layout.selects_logits
    assert report.facts["memory"]["device"]["total"] / 1e9 == pytest.approx(said.needed, abs=0.6)


def conversations_of_full_length(config):
    """Prepared data of conversations as long as the recipe allows, all supervised: the largest micro-batches."""
    length = config.data.model_max_length
    rows = [length] * config.batch.world_size * config.batch.per_device_batch * config.batch.accumulation
    examples = Dataset.from_dict({"length": rows, "num_supervised": rows})
    return SimpleNamespace(longest=length, epoch=lambda seed: SimpleNamespace(examples=examples))


@pytest.mark.slow
@pytest.mark.parametrize("name", REHEARSED)
def test_two_steps_of_a_small_model_of_the_same_architecture(name, tmp_path, smol_tokenizer):
    path, values = RECIPES[name], yaml.safe_load(RECIPES[name].read_text())
    source = tmp_path / "source"
    smol_tokenizer.save_pretrained(source)
    config = json.loads((CONFIGS / f"{values['model_name_or_path'].rpartition('/')[2]}.json").read_text())
    text = config.get("text_config", config)
    text["vocab_size"] = max(text["vocab_size"], len(smol_tokenizer))
    (source / "config.json").write_text(json.dumps(config))
    make_random_model(str(source), tmp_path / "model", revision=None, trust_remote_code=False)
    world_size = min(foreseen(path).per_host, 2)
    changed = {
        "model_name_or_path": tmp_path / "model", "output_dir": tmp_path / "output", "use_cpu": True, "max_steps": 2,
        "data_path": ROOT / "data/conversations.json", "gradient_accumulation_steps": 1, "model_max_length": 256,
        "per_device_train_batch_size": 1, "sequence_parallel_size": min(values.get("sequence_parallel_size", 1), 2),
        "allow_seen_held_out": True, "report_answers": 0,
    }  # fmt: skip

    words = train_verb.parse_options([str(path), *flag_words(changed)]).script_args
    outcome = ranks.train(tmp_path / "logs", words, world_size)

    assert outcome.succeeded, "\n".join(outcome.outputs)
    saved = {file.name for file in (tmp_path / "output").glob("*model.safetensors")}
    assert saved == {"adapter_model.safetensors" if values.get("use_lora") else "model.safetensors"}


def test_recipes_are_listed_with_what_they_are_for(capsys):
    recipes_verb.main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(RECIPES) >= 15
    for name, path in RECIPES.items():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert path.read_text().splitlines()[0].removeprefix("# ") in line


def test_a_recipe_is_copied_but_never_over_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipes_verb.main(["qwen3_8b_lora"])
    recipes_verb.main(["qwen3_8b_lora.yaml", "mine.yaml"])
    copies = [tmp_path / "qwen3_8b_lora.yaml", tmp_path / "mine.yaml"]
    assert [copy.read_text() for copy in copies] == [RECIPES["qwen3_8b_lora"].read_text()] * 2
    for words, fault in {
        ("qwen3_8b_lora",): "qwen3_8b_lora.yaml: exists and is not replaced",
        ("qwen3_8b_lora", "absent/mine.yaml"): "absent/mine.yaml: there is no folder absent",
        ("qwen3_8b_lroa",): "did you mean qwen3_8b_lora?",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(fault)):
            recipes_verb.main(words)


def test_a_shipped_recipe_is_trained_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["qwen3_8b_full_8gpu", "--data_path", "my.jsonl", "learning_rate=2e-5"]
    arguments = parse(train_verb.parse_options(words).script_args)
    assert arguments.run.config == str(RECIPES["qwen3_8b_full_8gpu"])
    assert arguments.training["learning_rate"] == 2e-5 and arguments.model.model_name_or_path == "Qwen/Qwen3-8B"
