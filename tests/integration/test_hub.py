"""A hub that cannot be reached."""

import pytest

from finetune.cli.push import PushOptions, upload
from finetune.dataset.data_sources import find_sources
from finetune.utils.errors import DataError, FinetuneError


def refused(*paths: str) -> str:
    with pytest.raises(DataError) as raised:
        find_sources(paths)
    return str(raised.value)


def test_a_hub_that_cannot_be_reached_is_named_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for variable in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)

    for name in ("owner/chats", "owner/chats:train", "owner/chats:small/train:0.5"):
        message = refused(name)
        assert message.startswith(
            f"{name.removesuffix(':0.5')}: there is no such file, and the hub at http://127.0.0.1:9 "
        )
        assert "set HF_ENDPOINT" in message and "local copy" in message


def test_a_result_is_not_uploaded_without_token_or_network(monkeypatch):
    options = PushOptions("output", "me/name", yes=True)
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(FinetuneError, match="no token: .*HF_TOKEN"):
        upload({"README.md": b""}, options)
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FinetuneError, match=r"http://127.0.0.1:9: .*network") as raised:
        upload({"README.md": b""}, options)
    assert raised.value.status == 1
