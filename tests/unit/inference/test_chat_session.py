"""The conversation of a chat with tools: what a message asks, what is undone, and what is saved."""

import html

import pytest

from finetune.conversation import ToolCall, Turn
from finetune.dataset.conversation_reader import read_conversations
from finetune.inference.chat_session import ChatSession, save_conversation
from finetune.inference.web_session import WebSession
from finetune.utils.errors import ConfigError

TOOLS = tuple({"type": "function", "function": {"name": name, "parameters": {}}} for name in ("f", "g"))
CALLS = Turn("model", "", reasoning="Both.", tool_calls=(ToolCall("f", {"x": 1}), ToolCall("g", {})))


@pytest.fixture
def called():
    chat = ChatSession(None, TOOLS)
    chat.add(chat.asked("Go."), CALLS)
    return chat


def test_results_are_asked_about_once_all_calls_have_one(called):
    assert called.asked("/tool 1") == ()
    asked = called.asked("/tool {}")
    assert [(turn.role, turn.text, turn.tool_name) for turn in asked] == [("tool", "1", "f"), ("tool", "{}", "g")]
    called.add(asked, Turn("model", "Done."))
    assert called.open_calls == () and [turn.role for turn in called.turns()] == [
        "human",
        "model",
        "tool",
        "tool",
        "model",
    ]


def test_messages_are_undone_one_by_one_as_they_were_typed(called):
    called.asked("/tool 1")
    called.add(called.asked("/tool 2"), Turn("model", "Done."))
    assert [called.undo() for _ in range(4)] == ["/tool 2", "/tool 1", "Go.", None]


def test_one_result_is_given_again(called):
    called.asked("/tool 1")
    called.add(called.asked("/tool 2"), Turn("model", "Done."))
    assert [turn.text for turn in called.asked(called.undo())] == ["1", "2"]


@pytest.mark.parametrize(("message", "reason"), [("And?", "has no result"), ("/tool  ", "has no text")])
def test_a_call_waits_for_its_result(called, message, reason):
    with pytest.raises(ConfigError, match=reason):
        called.asked(message)


def test_a_result_needs_a_call():
    with pytest.raises(ConfigError, match="has called no tool"):
        ChatSession().asked("/tool 1")


def test_a_saved_row_is_read_back_with_tools_calls_and_reasoning(called, tmp_path):
    called.asked("/tool 1")
    called.add(called.asked("/tool 2"), Turn("model", "Done."))
    save_conversation(tmp_path / "a.json", called.turns(), called.tools)
    (row,) = read_conversations(tmp_path / "a.json")
    assert list(row.turns) == called.turns() and row.tools == TOOLS


def test_the_page_shows_calls_as_code_and_reasoning_folded(called):
    session = WebSession(called, [None])
    called.asked("/tool 1")
    shown, base = session.columns()
    assert [message["role"] for message in shown] == [
        "user",
        "assistant",
        "assistant",
        "assistant",
        "user",
        "assistant",
    ]
    assert base == [] and shown[1]["metadata"]["title"] == "Reasoning"
    assert html.unescape(shown[2]["content"]) == '<div><pre><code>f({"x": 1})</code></pre></div>'
    assert session.undo() == "/tool 1" and len(session.base_answers) == 1
    assert session.undo() == "Go." and session.base_answers == []
