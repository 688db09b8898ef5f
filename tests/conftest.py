"""What several test files share: a byte tokenizer, a tiny model, the small pretrained one, conversation files."""

import logging
import os
import signal
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.helpers import environment  # noqa: F401, before torch
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.paths import PRETRAINED, TOKENIZERS
from tests.helpers.rows import ROWS, write_rows
from tests.helpers.short_runs import KINDS_OF_RESULTS, SHORT

settings.register_profile("tests", deadline=None, derandomize=True)  # other tests may have the processor
settings.load_profile("tests")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a background job of a shell, and then in all that is started
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", default="0/1", help="run the tests of one share only: K/N, K from 0")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the tests of other shares."""
    index, count = map(int, config.getoption("--share").split("/"))
    shares: tuple[list[pytest.Item], list[pytest.Item]] = ([], [])
    for item in items:
        shares[zlib.crc32(item.nodeid.encode()) % count == index].append(item)
    others, items[:] = shares
    config.hook.pytest_deselected(items=others)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A share of a few tests may hold none of them: that is no failure."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.getoption("--share") != "0/1":
        session.exitstatus = pytest.ExitCode.OK


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
def smol_tokenizer():
    """The real tokenizer of the small model, of which no weights are needed."""
    from transformers import AutoTokenizer

    assert (PRETRAINED / "tokenizer.json").is_file(), "the small model is missing: make model"
    return AutoTokenizer.from_pretrained(PRETRAINED)


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
    from tests.helpers import ranks

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
    from tests.helpers import ranks

    output = tmp_path_factory.mktemp("learned") / "by heart"
    named = ["--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", output]
    flags = "--num_train_epochs 60 --per_device_train_batch_size 6 --learning_rate 1e-2 --save_strategy no".split()
    outcome = ranks.train(output.parent / "logs", [*named, *flags], world_size=1)
    assert outcome.succeeded, "\n".join(outcome.outputs)
    return output


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, conversation_file: Path) -> Callable[..., Path]:
    """A result of each kind, with a checkpoint in it, trained when it is first asked for; not to be changed."""
    from tests.helpers import ranks

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
    from tests.helpers import hosts

    hosts.require()
    with hosts.running(2, tmp_path_factory.mktemp("hosts")) as nodes:
        yield nodes


@pytest.fixture(scope="session")
def three_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list]:
    """Three hosts."""
    from tests.helpers import hosts

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
