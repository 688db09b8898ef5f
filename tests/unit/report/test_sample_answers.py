"""Prompts out of the data or a file, answers that are made once, and what stands in their way."""

import json
from dataclasses import replace

import pytest

from finetune.cli import report
from finetune.conversation import Conversation, ToolCall, Turn
from finetune.report import read_run
from finetune.report.sample_answers import SamplePrompt, prompts_of, read_prompts
from finetune.run_dir.data_samples import read_samples
from finetune.utils.errors import ConfigError
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.reported import answer, card, output_dir

CONTINUED = (Turn("tool", "1"), Turn("model", "Done."))


def asked(*texts: str) -> list[SamplePrompt]:
    return [SamplePrompt((Turn("human", text),)) for text in texts]


def test_prompts_are_the_first_human_turns_of_rows_kept_whole(tmp_path):
    rows = [
        card(0, "First?", "One."),
        card(1, "Cut?", "No.", status="cut"),
        card(2, "First?", "One."),
        card(3, "好", "嗯"),
    ]
    rows.append({**card(4, "Long", "x"), "unshown": 5})
    rows[3]["prompt"] = [7, 8]
    cards = read_samples(output_dir(tmp_path / "one", cards=rows))
    assert prompts_of(cards, 9) == [
        SamplePrompt((Turn("human", "First?"),), "One."),
        SamplePrompt((Turn("human", "好"),), "嗯"),
    ]
    assert [prompt.ids for prompt in prompts_of(cards, 9)] == [(), (7, 8)]
    assert len(prompts_of(cards, 1)) == 1 and prompts_of(cards, 0) == []


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.txt", "\ufeffWho?\n\n  What? \n你好\n", ["Who?", "What?", "你好"]),
        ("a.json", '["Who?", {"question": "What?"}, ""]', ["Who?", "What?"]),
    ],
)
def test_prompts_of_a_file(tmp_path, name, text, found):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert [one.turns[0].text for one in read_prompts(tmp_path / name)] == found


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"\xff\xfe", "not UTF-8 at byte 0"),
        ("a.json", b"{\n", "line 2, column 1: not JSON"),
        ("a.json", b'{"question": "x"}', "expected an array of texts"),
        ("a.json", b"[1]", "expected an array of texts"),
        ("a.json", b"3", "expected an array of texts"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read_prompts(tmp_path / name)


def test_hurried_answers_are_made_again(tmp_path, monkeypatch):
    folder = output_dir(tmp_path / "one", answers=[answer("Q", "a", "b", hurried=True)])
    assert report._needs_answers(read_run(folder), [])
    stored = json.loads((folder / "answers.json").read_text())
    stored["answers"][0]["hurried"] = False
    (folder / "answers.json").write_text(json.dumps(stored))
    run = read_run(folder)
    assert not report._needs_answers(run, []) and not report._needs_answers(run, asked("Q"))
    assert report._needs_answers(run, asked("Other"))


def test_the_prompt_of_a_row_with_tools_is_that_of_serving():
    from finetune.chat_templates import Renderer, prompt_ids, select_chat_format
    from finetune.chat_templates.text_segments import segmenter
    from finetune.run_dir.data_samples import sample_of

    chat_format = select_chat_format(byte_tokenizer(), "hermes")[0]
    tools = ({"type": "function", "function": {"name": "f", "parameters": {}}},)
    asked = Conversation((Turn("human", "Go."),), tools=tools)
    row = replace(asked, turns=(*asked.turns, Turn("model", "", tool_calls=(ToolCall("f", {}),))))
    sample = sample_of(Renderer(chat_format, 1000).render(row), segmenter(chat_format))
    (prompt,) = prompts_of([sample], 1)
    assert list(prompt.ids) == prompt_ids(chat_format, asked) and '"f"' in prompt.expected
    unsupervised = replace(row, turns=(*row.turns[:1], replace(row.turns[1], train=False), *CONTINUED))
    assert sample_of(Renderer(chat_format, 1000).render(unsupervised), segmenter(chat_format)).prompt == []
