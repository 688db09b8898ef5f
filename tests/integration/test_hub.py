"""A hub that cannot be reached."""

from __future__ import annotations

import pytest

from finetune.dataset.data_sources import find_sources
from finetune.utils.errors import DataError


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
