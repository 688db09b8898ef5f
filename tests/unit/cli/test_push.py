"""What `finetune push` uploads, what it asks, and what it says of a hub that refuses."""

import io
import json
import sys
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save_file

from finetune.cli import push
from finetune.utils.errors import ConfigError, FinetuneError
from tests.helpers.made_results import SUMMARY

PRIVATE = (
    "samples.json", "answers.json", "data_ledger.jsonl", "report.html", "train.log", "metrics.jsonl", "mine.json",
    "trainer_state.json", "RUN_COMPLETE", "failure.json", "non_finite_rows.jsonl", "optimizer.pt",
)  # fmt: skip
PUBLIC = ("adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "LICENSE")


class Hub:
    """The hub's client: notes what it is asked, and may refuse with a status."""

    def __init__(self, status: int | None = None):
        self.status, self.uploaded, self.created = status, {}, []

    def whoami(self):
        return {"name": "me"}

    def create_repo(self, repo, **options):
        if self.status:
            raise huggingface_hub.errors.HfHubHTTPError("no", response=SimpleNamespace(
                status_code=self.status, headers={}, request=None))  # fmt: skip
        self.created.append((repo, options["private"]))

    def create_commit(self, repo, operations, **_):
        self.uploaded = {one.path_in_repo: one.path_or_fileobj for one in operations}


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "output"
    (folder / "checkpoint-1").mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "lora_dropout": 0}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("[More Information Needed]")
    for name in (*PRIVATE, *PUBLIC, "checkpoint-1/model.safetensors"):
        (folder / name).write_text("x")
    save_file({"a": np.zeros(1)}, folder / "adapter_model.safetensors")
    model = {"name": "/home/me/base", "folder": "/home/me/base", "revision": None, "weights": "0", "fingerprint": "0"}
    chat = {"format": "chatml", "human_token_ids": [], "model_token_ids": [], "content_tokens": [], "stop_token_id": 2}
    run = {"model": model, "chat": chat, "precision": "bf16", "arguments": {"data_path": ["/home/me/d.json"]},
           "data": {"summary": SUMMARY, "fingerprint": "0"}, "world_size": 1, "versions": {}}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run))
    return folder


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


def test_the_result_is_uploaded_and_nothing_that_holds_data(output, hub, capsys):
    push.main([str(output), "me/name", "--private", "--yes"])
    assert sorted(hub.uploaded) == sorted([*PUBLIC, "adapter_config.json", "README.md", "run.json"])
    assert hub.created == [("me/name", True)]
    shown = capsys.readouterr().out
    assert all(name in shown for name in hub.uploaded) and "me/name (private), as me" in shown
    for name in ("README.md", "run.json"):
        assert b"/home/me" not in hub.uploaded[name] and b"More Information" not in hub.uploaded[name]


@pytest.mark.parametrize(("answer", "count"), [("y\n", 7), ("\n", 0)])
def test_it_asks(output, hub, monkeypatch, answer, count):
    terminal = io.StringIO(answer)
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    push.main([str(output), "me/name"])
    assert len(hub.uploaded) == count
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(ConfigError, match="--yes"):
        push.main([str(output), "me/name"])


@pytest.mark.parametrize(("status", "said"), [(401, "hf auth login"), (403, "write access"), (404, "owner/name")])
def test_a_refusal_is_an_error_with_a_remedy(output, hub, status, said):
    hub.status = status
    with pytest.raises(FinetuneError, match=said) as raised:
        push.main([str(output), "me/name", "--yes"])
    assert raised.value.status == 1 and not hub.uploaded


def test_a_folder_without_weights_is_an_error(output):
    (output / "adapter_model.safetensors").unlink()
    (output / "adapter_config.json").rename(output / "config.json")
    with pytest.raises(ConfigError, match="no weights"):
        push.main([str(output), "me/name", "--yes"])
