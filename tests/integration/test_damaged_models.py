"""A base model whose files were damaged, in any way, is one `ConfigError` that names it, never another exception."""

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from finetune.config.arguments import ModelArguments
from finetune.models import loader
from finetune.utils.errors import ConfigError
from tests.helpers import made_results, tiny_models

VALUES = [None, 0, -1, 10**12, 2**63, 1.5, float("nan"), "x", "", [], [1], {}, {"a": 1}, True, "../../x", [[]]]
NAMES = ["../../etc/passwd", "/etc/passwd", "..", "", "a/../b.bin", "x\0.bin", "a" * 5000 + ".bin", None, 3, [], {}]
HEADERS = [{"dtype": "X"}, {"dtype": None}, {"dtype": "F64"}, {"shape": [-1, 2]}, {"shape": [2**40, 2**40]},
           {"shape": 0}, {"data_offsets": [0, 2**60]}, {"data_offsets": [5, 1]}, {"data_offsets": None}]  # fmt: skip


def change_bytes(path: Path, chance: random.Random) -> None:
    """Cut the file, flip a byte near its begin, or replace all of it."""
    content = bytearray(path.read_bytes())
    place = chance.randrange(min(len(content), 2000))
    content[place] = chance.randrange(256)
    path.write_bytes(chance.choice([content, content[:place], b"", b"[" * 100_000, b"[]", b"null", b'"x"', b"3"]))


def change_value(path: Path, chance: random.Random) -> None:
    """Replace or remove one value of a JSON file, at any depth."""
    whole = json.loads(path.read_text())
    node: Any = whole
    while True:
        key = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or chance.random() < 0.3:
            break
        node = node[key]
    node[key] = chance.choice(VALUES)
    path.write_text(json.dumps(whole))


def change_header(path: Path, chance: random.Random) -> None:
    """Let a safetensors header lie about its length or about a tensor."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header[chance.choice([name for name in header if name != "__metadata__"])].update(chance.choice(HEADERS))
    text = json.dumps(header).encode()
    stated = chance.choice([len(text), len(text), 0, 2**63, 2**40, 99_000_000])
    path.write_bytes(struct.pack("<Q", stated) + text + content[8 + length :])


def change_index(path: Path, chance: random.Random) -> None:
    """Put an index in the place of the file, which names another one."""
    path.rename(path.with_name("model-1.safetensors"))
    names = {"lm_head.weight": "model-1.safetensors", "model.norm.weight": chance.choice(NAMES)}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"weight_map": names}))


def tried(folder: Path) -> str | None:
    try:
        loader.inspect_model(ModelArguments(str(folder)), "eager")
        loader.load_tokenizer(str(folder), trust_remote_code=False)
    except ConfigError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return made_results.save_base(tiny_models.build("llama"), tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    "seeds", [range(50), pytest.param(range(50, 300), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_any_damage_is_one_error_that_names_the_model(seeds, model, tmp_path):
    refused = 0
    for seed in seeds:
        chance = random.Random(seed)
        folder = shutil.copytree(model, tmp_path / f"model-{seed}")
        change = chance.choice([change_bytes, change_value, change_header, change_index])
        weights = change in (change_header, change_index) or (change is change_bytes and chance.random() < 0.5)
        files = [folder / "model.safetensors"] if weights else sorted(folder.glob("*.json"))
        change(chance.choice(files), chance)
        message = tried(folder)
        assert message is None or ("\n" not in message and folder.name in message and len(message) < 1200), message
        refused += message is not None
        shutil.rmtree(folder)
    assert refused > 0.6 * len(seeds)


@pytest.mark.parametrize(
    "values",
    [{"num_attention_heads": 0}, {"num_hidden_layers": 10**9}, {"hidden_size": -8}, {"eos_token_id": "x"}],
    ids=str,
)
def test_values_that_no_model_has_are_named_before_anything_is_built(values, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    assert f"{folder}/config.json: {next(iter(values))} " in tried(folder)
