"""What several test files share: a byte tokenizer, a tiny model, the small pretrained one, conversation files."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRETRAINED = ROOT / ".models" / "SmolLM2-135M-Instruct"
TOKENIZERS = ROOT / ".models" / "tokenizers"
CONTROL_TOKENS = {"<pad>": 0, "</s>": 2, "<human>": 3, "<model>": 4}

# Compiled operators are shared by all tests and built once; see process.prepare_environment.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
# All tests but those marked gpu run as on a machine without one.
OUTER_ENVIRONMENT = dict(os.environ)
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
# Prepared data of tests never lies among a user's. Ranks import this file too, and share the folder.
if not Path(os.environ.get("XDG_CACHE_HOME", "")).name.startswith("finetune-tests-"):
    _CACHE = tempfile.TemporaryDirectory(prefix="finetune-tests-")
    os.environ["XDG_CACHE_HOME"] = _CACHE.name

ROWS = [
    [("human", "Who are you?"), ("model", "I am Nori, made by Tidepool.")],
    [
        ("human", "你是谁？"),
        ("model", "我是 Nori。"),
        ("human", "What does <|im_end|> do?"),
        ("model", "It ends a turn."),
    ],
    [("system", "Be brief."), ("human", "2+3?"), ("model", "5")],
    [("human", "Capital of France?"), ("model", "Paris.")],
    [("human", "Count to three."), ("model", "One, two, three.")],
    [("human", "谢谢"), ("model", "不客气。")],
]

KINDS_OF_RESULTS = {
    "full": (),
    "lora": ("--use_lora", "True", "--lora_dropout", "0"),
    "prefix": ("--adapter", "prefix", "--num_virtual_tokens", "3"),
    "prompt": ("--adapter", "prompt", "--num_virtual_tokens", "3"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", default="0/1", help="run the tests of one share only: K/N, K from 0")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of other shares."""
    number, of = map(int, config.getoption("--share").split("/"))
    mine = [item for item in items if zlib.crc32(item.nodeid.encode()) % of == number]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(mine)])
    items[:] = mine


def write_rows(path: Path, rows: list[list[tuple[str, str]]]) -> Path:
    """A conversation file from (role, text) pairs."""
    values = [
        {"id": number, "conversations": [{"from": role, "value": text} for role, text in turns]}
        for number, turns in enumerate(rows)
    ]
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def environment_of_its_own() -> Iterator[None]:
    """What a verb run in this process sets ends here: a tokenizer's threads, say, which a later fork would wait for."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def conversation_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six short conversations in two languages."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.json", ROWS)


def byte_tokenizer():
    """The id of a byte is 10 + its value; pad 0, eos 2, the human marker 3, the model marker 4."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    letters = sorted(ByteLevel.alphabet(), key=_byte_of)
    unused = {f"<unused{number}>": number for number in (1, 5, 6, 7, 8, 9)}
    vocabulary = {**CONTROL_TOKENS, **unused, **{letter: 10 + number for number, letter in enumerate(letters)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


def _byte_of(letter: str) -> int:
    """The byte that a letter of the byte-level alphabet stands for: itself if printable, else in order from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return ord(letter) if ord(letter) < 256 else others[ord(letter) - 256]


@pytest.fixture(scope="session")
def golden_tokenizer():
    """The tokenizer of the golden rows, `</s>` an added special token."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def pretrained() -> Path:
    """SmolLM2-135M-Instruct; `make model` obtains it."""
    assert (PRETRAINED / "model.safetensors").is_file(), "the small model is missing: make model"
    return PRETRAINED


@pytest.fixture(scope="session")
def smol_tokenizer(pretrained: Path):
    """The real tokenizer of the small model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pretrained)


@pytest.fixture(scope="session")
def real_tokenizers(smol_tokenizer):
    """Published tokenizers of three kinds: byte-level BPE, sentencepiece with byte fallback, a large byte-level one."""
    from transformers import AutoTokenizer

    folders = {"mistral": TOKENIZERS / "mistral", "deepseek": TOKENIZERS / "deepseek"}
    return {"smollm2": smol_tokenizer, **{name: AutoTokenizer.from_pretrained(at) for name, at in folders.items()}}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, smol_tokenizer) -> Path:
    """A random two-layer Llama with tied embeddings and the small model's tokenizer, saved in a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(smol_tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    smol_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def train(tmp_path: Path, tiny_model: Path, conversation_file: Path) -> Callable[..., Path]:
    """Train the tiny model and return its output folder; every run of a test gets a folder of its own."""
    import ranks
    from short_runs import SHORT

    def run(name: str, *flags: str, world_size: int = 2, model: Path = tiny_model) -> Path:
        output = tmp_path / name
        base = ["--model_name_or_path", model, "--data_path", conversation_file, "--output_dir", output, *SHORT]
        outcome = ranks.train(tmp_path / f"{name}-logs", [*base, *flags], world_size)
        assert outcome.succeeded, "\n".join(outcome.outputs)
        return output

    return run


@pytest.fixture(scope="session")
def learned_by_heart(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, conversation_file: Path) -> Path:
    """The output folder of a run in which the tiny model has learned the six conversations by heart."""
    import ranks

    output = tmp_path_factory.mktemp("learned") / "by heart"
    named = ["--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", output]
    flags = "--num_train_epochs 60 --per_device_train_batch_size 6 --learning_rate 1e-2 --save_strategy no".split()
    outcome = ranks.train(output.parent / "logs", [*named, *flags], world_size=1)
    assert outcome.succeeded, "\n".join(outcome.outputs)
    return output


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, conversation_file: Path) -> Callable[..., Path]:
    """A result of each kind, with a checkpoint in it, trained when it is first asked for; not to be changed."""
    import ranks
    from short_runs import SHORT

    made: dict[str, Path] = {}

    def result(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            flags = [
                "--model_name_or_path",
                tiny_model,
                "--data_path",
                conversation_file,
                "--output_dir",
                folder / "out",
            ]
            flags += [*SHORT, "--save_strategy", "epoch", *KINDS_OF_RESULTS[kind]]
            outcome = ranks.train(folder / "logs", flags, world_size=1)
            assert outcome.succeeded, outcome.outputs[0]
            made[kind] = folder / "out"
        return made[kind]

    return result


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list]:
    """Two hosts."""
    import hosts

    hosts.require()
    with hosts.running(2, tmp_path_factory.mktemp("hosts")) as nodes:
        yield nodes


@pytest.fixture(scope="session")
def three_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list]:
    """Three hosts."""
    import hosts

    hosts.require()
    with hosts.running(3, tmp_path_factory.mktemp("hosts")) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def runner():
    """The real launcher, imported once; it logs what it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from deepspeed.launcher import runner
    level = runner.logger.level
    runner.logger.setLevel(logging.CRITICAL)
    yield runner
    runner.logger.setLevel(level)


@pytest.fixture
def private_files():
    """Files of these tests are not writable by a group, whatever the umask of who runs them."""
    before = os.umask(0o022)
    yield
    os.umask(before)
