"""What a hub that refuses, or does not answer, is said to want; without a network."""

import contextlib
import socket

import huggingface_hub
import pytest
from huggingface_hub import errors

from finetune.utils import hub
from finetune.utils.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.HFValidationError, "no such folder, and no name of a model: gone"),
        (errors.LocalEntryNotFoundError, "no such folder, not in the cache"),
        (errors.GatedRepoError, "ask for access at "),
        (errors.RevisionNotFoundError, "--model_revision main: "),
        (errors.EntryNotFoundError, "/a/b holds no config.json: give a model that transformers loads"),
        (errors.RepositoryNotFoundError, "no such folder, and no such model at "),
        (errors.HfHubHTTPError, ": gone: try again later, or give the folder of a model"),
    ],
)
def test_why_a_file_of_a_model_cannot_be_had(kind, said, monkeypatch):
    def fail(*_, **__):
        error = kind.__new__(kind)  # they are built from the answer of a server
        Exception.__init__(error, "gone")
        raise error

    monkeypatch.setattr(hub, "use_cache_if_hub_unreachable", lambda: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ConfigError) as raised:
        hub.hub_file("a/b", "config.json", "main")
    assert str(raised.value).startswith("--model_name_or_path a/b: ") and said in str(raised.value)


@pytest.mark.parametrize(
    ("endpoint", "asked"),
    [("https://hub", ("hub", 443)), ("http://hub", ("hub", 80)), ("http://hub:8080", ("hub", 8080))],
)
def test_a_hub_is_reachable_where_its_port_answers_or_a_proxy_stands_in_between(endpoint, asked, monkeypatch):
    for name in hub.PROXIES:
        monkeypatch.delenv(name, raising=False)
    seen = []

    def connect(address, timeout):
        seen.append(address)
        return contextlib.nullcontext()

    monkeypatch.setattr(socket, "create_connection", connect)
    assert hub._is_reachable(endpoint) and seen == [asked]
    monkeypatch.setattr(socket, "create_connection", lambda *_: 1 / 0)
    monkeypatch.setenv("https_proxy", "http://proxy")
    assert hub._is_reachable(endpoint)


@pytest.mark.parametrize("endpoint", ["http://hub", "http://hub:port", "http://hub:99999"])
def test_a_hub_that_does_not_answer_is_not_reachable(endpoint, monkeypatch):
    for name in hub.PROXIES:
        monkeypatch.delenv(name, raising=False)

    def refuse(*_):
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert not hub._is_reachable(endpoint)
