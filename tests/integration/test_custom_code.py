"""A model with Python files of its own and a sentencepiece tokenizer trains, saves with its files, and loads again."""

import json
import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import made_results, ranks
from tests.helpers.paths import ROOT
from tests.helpers.rows import ROWS
from tests.helpers.tiers import mostly_slow
from tests.helpers.verbs import finetune_text

FLAGS = (
    "--gradient_checkpointing True --num_train_epochs 2 --per_device_train_batch_size 2 --learning_rate 1e-2 "
    "--logging_steps 1"
).split()


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    """Made in a process of its own: registering code with transformers' Auto classes is global."""
    folder = tmp_path_factory.mktemp("stand_in")
    process = ranks.FORKSERVER.Process(target=make, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return folder


def make(folder: Path) -> None:
    """A folder as the hub would hold it: weights, config with auto_map, code, a sentencepiece model."""
    import sentencepiece
    import torch

    from tests.helpers.qkv_code import QkvConfig, QkvForCausalLM

    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(text for turns in ROWS for _, text in turns) + "\nabcdefghijklmnopqrstuvwxyz", "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=380, byte_fallback=True,
        model_type="bpe", pad_id=0, bos_id=1, eos_id=2, unk_id=5, user_defined_symbols=["<human>", "<model>"],
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()
    torch.manual_seed(0)
    QkvForCausalLM(QkvConfig()).save_pretrained(folder)
    shutil.copy(ROOT / "tests/helpers/qkv_code.py", folder / "modeling_qkv.py")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_qkv.QkvConfig",
        "AutoModelForCausalLM": "modeling_qkv.QkvForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"})
    )


def load(output: Path, adapter: bool) -> list[str]:
    """Load a result, and what it is merged into, in a fresh interpreter that knows nothing of the stand-in.

    Returns the ids that each generates.
    """
    code = (
        "from peft import AutoPeftModelForCausalLM; from transformers import AutoModelForCausalLM; import torch\n"
        f"for kind, folder in (({'AutoPeftModelForCausalLM' if adapter else 'AutoModelForCausalLM'}, '.'),\n"
        "                     (AutoModelForCausalLM, 'merged')):\n"
        "    model = kind.from_pretrained(folder, trust_remote_code=True)\n"
        "    ids = torch.tensor([[3, 20, 30, 4]])\n"
        "    print(model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=output)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("stage", "adapter"),
    [
        pytest.param("zero2", (), marks=pytest.mark.slow),
        ("zero3", ()),
        pytest.param("zero3", ("--use_lora", "True", "--lora_target_modules", "qkv_proj"), marks=pytest.mark.slow),
    ],
    ids=["full-zero2", "full-zero3", "lora-zero3"],
)
def test_it_trains_saves_its_code_and_loads(stand_in, conversation_file, tmp_path, stage, adapter):
    output = tmp_path / "output"
    flags = ["--model_name_or_path", stand_in, "--data_path", conversation_file, "--output_dir", output]
    outcome = ranks.train(
        tmp_path / "logs",
        [
            *flags,
            *FLAGS,
            *adapter,
            "--deepspeed",
            stage,
            "--trust_remote_code",
            "True",
            "--chat_template",
            "lingowhale",
        ],
    )
    assert outcome.succeeded, outcome.outputs[0]
    assert outcome.outputs[0].count(f"trusting the Python files in {stand_in}: modeling_qkv.py (sha256 ") == 1
    assert "trusting" not in outcome.outputs[1]
    assert "--activation_checkpointing is off: this model's code does not support it" in outcome.outputs[0]
    if not adapter:
        assert (output / "modeling_qkv.py").is_file()
    merged = finetune_text("merge", output, "--trust_remote_code")
    assert merged.returncode == 0, merged.stderr
    assert (output / "merged/modeling_qkv.py").is_file() and "the first choice is the same" in merged.stdout
    ids, of_merged = load(output, bool(adapter))
    assert "[[3, 20, 30, 4" in ids and of_merged == ids


def test_without_the_flag_the_error_names_it(stand_in, conversation_file, tmp_path):
    flags = ["--model_name_or_path", stand_in, "--data_path", conversation_file, "--output_dir", tmp_path / "output"]
    outcome = ranks.train(tmp_path / "logs", [*flags, "--deepspeed", "zero2"], world_size=1)
    assert outcome.statuses == [2]
    assert "has Python files of its own" in outcome.outputs[0]
    assert "--trust_remote_code True" in outcome.outputs[0]
    assert "Traceback" not in outcome.outputs[0]


SECONDS_TO_REFUSE = 15
MARKED = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
pathlib.Path({marker!r}).write_text({words!r})
class MarkedConfig(LlamaConfig):
    model_type = "marked"
class MarkedForCausalLM(LlamaForCausalLM):
    config_class = MarkedConfig
class MarkedTokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {"AutoConfig": "marked.MarkedConfig", "AutoModelForCausalLM": "marked.MarkedForCausalLM"}
TOKENIZER_MAP = {"AutoTokenizer": [None, "marked.MarkedTokenizer"]}


def write_marked(folder: Path, tiny_model: Path, marker: Path, words: str, *, kind: str = "model") -> Path:
    """A model whose code, of all of it or of its tokenizer alone, leaves a file when it is imported."""
    shutil.copytree(tiny_model, folder)
    (folder / "marked.py").write_text(MARKED.format(marker=str(marker), words=words))
    file, key = ("config.json", "model_type") if kind == "model" else ("tokenizer_config.json", "tokenizer_class")
    values = json.loads((folder / file).read_text())
    values |= {key: "marked" if kind == "model" else "MarkedTokenizer"}
    values["auto_map"] = AUTO_MAP if kind == "model" else TOKENIZER_MAP
    (folder / file).write_text(json.dumps(values))
    return folder


def _train_at_a_terminal(terminal: str, argv: list[str]) -> None:
    """The story on a rank whose stdin is a terminal at which nobody sits; no rank waits for another's message."""
    from finetune import train
    from finetune.utils import errors

    errors.SECONDS_FOR_RANK_0 = 0.0
    os.dup2(os.open(terminal, os.O_RDWR), 0)
    sys.stdin = os.fdopen(0)
    assert sys.stdin.isatty()
    begin = time.monotonic()
    try:
        train.main(argv)
    finally:
        print(f"seconds: {time.monotonic() - begin:.1f}", flush=True)


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_code_that_is_not_trusted_is_refused_on_all_ranks_without_a_question(
    kind, tiny_model, conversation_file, tmp_path
):
    marker = tmp_path / "marker"
    folder = write_marked(tmp_path / "marked", tiny_model, marker, "ran", kind=kind)
    flags = ["--model_name_or_path", folder, "--data_path", conversation_file, "--output_dir", tmp_path / "output"]
    argv = [str(flag) for flag in (*flags, "--deepspeed", "zero2", "--max_steps", "1")]
    keyboard, terminal = pty.openpty()

    outcome = ranks.run(tmp_path / "logs", _train_at_a_terminal, (os.ttyname(terminal), argv))

    asked = _waiting_bytes(keyboard)
    os.close(terminal)
    assert outcome.statuses == [2, 2]
    for output in outcome.outputs:
        assert "has Python files of its own; if you trust them, give --trust_remote_code True" in output
        assert "[y/N]" not in output and "Traceback" not in output
        assert float(output.partition("seconds: ")[2].split()[0]) < SECONDS_TO_REFUSE
    assert not marker.exists() and asked == b""


def _waiting_bytes(keyboard: int) -> bytes:
    os.set_blocking(keyboard, False)
    try:
        return os.read(keyboard, 4096)
    except BlockingIOError:
        return b""
    finally:
        os.close(keyboard)


@pytest.fixture(params=mostly_slow(["model", "tokenizer", "base of an adapter"], ["model"]))
def result_with_code(request, tiny_model, tmp_path) -> Path:
    """An output folder whose run.json says that its code is trusted, and whose code leaves `tmp_path / "marker"`."""
    kind = "tokenizer" if request.param == "tokenizer" else "model"
    output = write_marked(tmp_path / "marked", tiny_model, tmp_path / "marker", "ran", kind=kind)
    run = made_results.run_of(output)
    if request.param == "base of an adapter":
        output = shutil.copytree(tiny_model, tmp_path / "adapter", ignore=lambda *_: ["config.json"])
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "lora_dropout": 0}
        (output / "adapter_config.json").write_text(json.dumps(config))
        (output / "model.safetensors").rename(output / "adapter_model.safetensors")
    run["model"]["trusts_code"] = run["arguments"]["trust_remote_code"] = True
    (output / "run.json").write_text(json.dumps(run))
    return output


def test_a_result_that_calls_itself_trusted_runs_nothing(result_with_code, conversation_file, tmp_path):
    (tmp_path / "prompts.txt").write_text("Who?")
    verbs = ("chat", "merge", f"evaluate --data_path {conversation_file}", f"report --prompts {tmp_path}/prompts.txt")
    for verb, *words in map(str.split, verbs):
        done = finetune_text(verb, result_with_code, *words, stdin=b"Hi\n")
        assert done.returncode == 2 or verb == "report", done.stderr
        assert "give --trust_remote_code True" in done.stderr, done.stderr
        assert not (tmp_path / "marker").exists(), verb
    modules = str(tmp_path / "modules")
    done = finetune_text("chat", result_with_code, "--trust_remote_code", stdin=b"Hi\n", HF_MODULES_CACHE=modules)
    assert (tmp_path / "marker").exists(), done.stderr


def test_the_hash_of_trusted_files_is_that_of_what_they_hold(tiny_model, tmp_path):
    from finetune.models.loader import code_note

    folder = write_marked(tmp_path / "a", tiny_model, tmp_path / "marker", "one")
    first, same = code_note(str(folder)), code_note(str(folder))
    (folder / "marked.py").write_text((folder / "marked.py").read_text() + "# another")

    assert first == same != code_note(str(folder))
    assert first.startswith(f"trusting the Python files in {folder}: marked.py (sha256 ")
    assert code_note(str(tiny_model)) is None
    assert not (tmp_path / "marker").exists()


OLD, NEW = "0" * 39 + "1", "f" * 40
LOAD = """
import json, sys
from pathlib import Path
from finetune.models import loader
from finetune.config import ModelArguments
from finetune.utils.errors import ConfigError
marker = Path(sys.argv[1])
def load(name, revision, **flags):
    marker.unlink(missing_ok=True)
    chosen = ModelArguments(name, model_revision=revision, **flags)
    try:
        found = loader.inspect_model(chosen, "sdpa")
        loader.load_tokenizer(name, revision=revision, trust_remote_code=chosen.trusts_code())
        weights = loader.load_model(
            found, loader.load_tokenizer(name, trust_remote_code=False), "float32", stop_token_id=None)
    except ConfigError as error:
        return [str(error), marker.exists()]
    return [list(found.notes), marker.read_text(), type(weights).__name__, loader.model_fingerprint(name, revision)]
print(json.dumps([load(*one, **flags) for one, flags in json.loads(sys.argv[2])]))
"""


@pytest.mark.slow
def test_a_revision_pins_the_code_and_the_one_exception_names_its_commit(tiny_model, tmp_path):
    """A hub's cache with two commits of two repositories; nothing is fetched."""
    marker, published = tmp_path / "marker", "deeplang-ai/LingoWhale-8B"
    for name in (published, "someone/marked"):
        cache = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        for commit in (OLD, NEW):
            write_marked(cache / "snapshots" / commit, tiny_model, marker, f"code of {commit}")
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(NEW)
    asked = [
        [[published, None], {}],
        [[published, OLD], {}],
        [[published, OLD], {"trust_remote_code": True}],
        [["someone/marked", None], {}],
        [["someone/marked", OLD], {"trust_remote_code": True}],
        [["someone/marked", "a" * 40], {"trust_remote_code": True}],
        [[str(tiny_model), OLD], {}],
    ]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_MODULES_CACHE": str(tmp_path / "modules")}

    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(marker), json.dumps(asked)], cwd=ROOT, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    newest, untrusted, pinned, refused, trusted, unknown, local = json.loads(done.stdout.splitlines()[-1])
    note = f"trusting the Python files of {published} at commit "
    assert newest[:3] == [
        [f"{note}{NEW}; pin it with --model_revision {NEW} --trust_remote_code True"],
        f"code of {NEW}",
        "MarkedForCausalLM",
    ]
    assert "give --trust_remote_code True" in untrusted[0] and untrusted[1] is False
    assert pinned[:3] == [[f"{note}{OLD}"], f"code of {OLD}", "MarkedForCausalLM"]
    assert newest[3] != pinned[3]
    assert "give --trust_remote_code True" in refused[0] and refused[1] is False
    assert trusted[1] == f"code of {OLD}"
    assert "someone/marked" in unknown[0] and unknown[1] is False
    assert local[0].startswith(f"--model_revision {OLD}: {tiny_model} is a folder")


def test_an_adapter_remembers_the_revision_of_its_base(tiny_model):
    from transformers import AutoModelForCausalLM

    from finetune.config import AdapterArguments
    from finetune.models.adapters import attach_peft
    from tests.helpers.lora import attach_lora

    for attach in (
        lambda base: attach_lora(base, r=2, alpha=4, dropout=0.0, target_modules=["q_proj"], base_revision=OLD),
        lambda base: attach_peft(base, AdapterArguments(adapter="prompt"), base_revision=OLD),
    ):
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        assert attach(base).peft_config["default"].revision == OLD
