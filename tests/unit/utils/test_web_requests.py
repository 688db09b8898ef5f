"""A page answers requests to its own name, from its own pages."""

import pytest

from finetune.utils.web_requests import is_own_request


@pytest.mark.parametrize(
    ("host", "origin", "listens_on", "is_own"),
    [
        ("localhost:1", None, "127.0.0.1", True), ("[::1]:2", None, "127.0.0.1", True),
        ("127.0.0.1:1", "http://127.0.0.1:1", "127.0.0.1", True), ("myhost:1", None, "MyHost", True),
        ("10.1.2.3:7860", None, "0.0.0.0", True), ("evil.test", None, "0.0.0.0", False),
        ("evil.test", None, "127.0.0.1", False), ("127.0.0.1.evil.test", None, "127.0.0.1", False),
        ("127.0.0.1:1", "http://127.0.0.1:2", "127.0.0.1", False), ("localhost", "null", "127.0.0.1", False),
        ("[", None, "127.0.0.1", False), ("", None, "0.0.0.0", False),
    ],
)  # fmt: skip
def test_own_requests(host, origin, listens_on, is_own):
    assert is_own_request(host, origin, listens_on) is is_own
