"""Bad and odd data files in one table: what becomes of each under both policies, through the real pipeline."""

import gzip
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from finetune.config import DataArguments, ModelArguments
from finetune.dataset.json_decoder import shown
from finetune.dataset.mojibake import intended_text
from finetune.dataset.prepare import check_dropped_share
from finetune.training.data_setup import prepare_run_data
from finetune.utils.errors import DataError
from tests.helpers import ranks
from tests.helpers.chat_rows import good_row, turns, written
from tests.helpers.logs import logged
from tests.helpers.paths import ROOT

SECONDS_FOR_PREVIEW = 120
GOOD, ALSO_GOOD = good_row(0), good_row(2)
CHINESE = turns(("human", "今天的天气怎么样？"), ("model", "今天的天气很好，适合出去走走。"))


@dataclass(frozen=True)
class Read:
    """All rows are accepted; `ledger` are those not kept whole, `said` stands in a line for the user."""

    rows: int
    ledger: dict[int, str] = field(default_factory=dict)
    said: str = ""


@dataclass(frozen=True)
class Dropped:
    """Status 3 with each of these places and words; under `--bad_rows drop` these rows alone go, by name."""

    rows: int
    places: dict[int, tuple[str, str]]


@dataclass(frozen=True)
class Refused:
    """The file, or the rest of it, cannot be read: status 3 under both policies, with the place and the words."""

    place: str
    words: str


def text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def among(row: Any) -> list:
    """A row between two good ones."""
    return [GOOD, row, ALSO_GOOD]


def literal(value: str) -> str:
    """A file of which row 1 has this literal as the value of its model turn."""
    return text(among(turns(("human", "a"), ("model", "@")))).replace('"@"', value)


def one_bad(words: str, turn: int | None = None, rows: int = 3) -> Dropped:
    return Dropped(rows, {1: (f"row 1, turn {turn}" if turn is not None else "row 1", words)})


def alone(words: str) -> Dropped:
    """The file's one value is no row."""
    return Dropped(1, {0: ("row 0", words)})


def conversation(*speakers: str) -> dict:
    return turns(*((name, f"{name} says {number}") for number, name in enumerate(speakers)))


def windows_1252(said: str) -> str:
    """The text as a program writes it that takes its UTF-8 for Windows-1252."""
    undefined = (0x81, 0x8D, 0x8F, 0x90, 0x9D)
    return "".join(chr(byte) if byte in undefined else bytes([byte]).decode("cp1252") for byte in said.encode())


# ---- the bytes of a file

G = text(GOOD)
BYTES = {
    "BOM": (b"\xef\xbb\xbf" + text([GOOD, ALSO_GOOD]).encode(), Read(2)),
    "UTF-16": (text([GOOD]).encode("utf-16"), Refused("", "the text is UTF-16, not UTF-8: convert it: iconv -f UTF-1")),
    "GBK": (
        text([GOOD, CHINESE]).encode("gbk"),
        Refused(f"line 1, column {len(G) + 51}", "the text is GBK or GB18030, not UTF-8: convert it: iconv -f GB18030"),
    ),
    "Big5": (
        text([turns(("human", "今天的天氣"), ("model", "很好"))]).encode("big5"),
        Refused("line 1, column 49", "not UTF-8 at byte 48: convert it, for example with iconv"),
    ),
    "Shift-JIS": (
        text([turns(("human", "今日の天気はどうですか"), ("model", "とても良いです"))]).encode("shift-jis"),
        Refused("line 1, column 49", "not UTF-8 at byte 48: convert it, for example with iconv"),
    ),
    "Latin-1": (
        text([GOOD, turns(("human", "café"), ("model", "b"))]).encode("latin-1"),
        Refused(f"line 1, column {len(G) + 54}", f"not UTF-8 at byte {len(G) + 53}: convert it"),
    ),
    "mojibake": (
        text([GOOD, *(turns(("human", windows_1252(f"你好“{n}”")), ("model", f"b{n}")) for n in range(3))]),
        Read(4, said="3 of 3 rows beyond ASCII look like UTF-8 that was read as Latin-1 or Windows-1252 and written "
             "again (row 1: 'ä½\\xa0å¥½â€œ0â€' was '你好“0”')"),
    ),
    "mojibake-as-a-subject": (
        text([turns(("human", f"é{n}"), ("model", "Ã©" if n == 9 else f"é{n}")) for n in range(200)]), Read(200)
    ),
    "trailing-comma": (f"[{G},\n{G},\n]", Refused("line 3, column 1", "not JSON: a comma before the closing bracket")),
    "comment-line": (f"[\n// the data\n{G}]", Refused("line 2, column 1", "not JSON: a comment, near ")),
    "comment-inside": (f"[{G},\n/* x */ {G}]", Refused("line 2, column 1", "not JSON: a comment, near ")),
    "comment-first": (f"# the data\n[{G}]", Refused("line 1, column 1", "expected a JSON array of conversations, or")),
    "single-quotes": (repr([GOOD]), Refused("line 1, column 3", "not JSON: a single quote, near ")),
    "True": (f'[{G},\n{{"ok": True}}]', Refused("line 2, column 8", "not JSON: Expecting value, near ")),
    "truncated": (
        text([GOOD, CHINESE])[:-9],
        Refused(f"line 1, column {text([GOOD, CHINESE]).index('今天的天气很')}", "not JSON: a string that does not"),
    ),
    "truncated-gzip": (gzip.compress(text([GOOD] * 9).encode())[:-9], Refused("", "the gzip stream is cut short")),
    "zeros-behind": (f"{G}\n".encode() + bytes(64), Dropped(2, {1: ("row 1, line 2, column 1", "not JSON: a NUL")})),
    "lines-in-json": (f"{G}\n{text(ALSO_GOOD)}\n", Read(2)),
    "blank-lines": (f"\n\n{G}\n\n \n{text(ALSO_GOOD)}\n\n", Read(2)),
    "two-arrays": (f"[{G}]\n[{text(ALSO_GOOD)}]", Refused("line 2, column 1", "not JSON: content after the closing")),
    "two-arrays-in-a-line": (
        f"[{G}][{text(ALSO_GOOD)}]", Refused(f"line 1, column {len(G) + 3}", "not JSON: content after the closing")
    ),
    "single-object": (json.dumps(GOOD, indent=2), Read(1)),
    "wrapper": (
        text({"data": [GOOD, ALSO_GOOD]}),
        alone('an object whose "data" holds a list of 2 rows: write them one a line, for example with jq -c'),
    ),
    "null": ("null", alone('expected an object with "conversations", found null')),
    "number": ("17", alone('expected an object with "conversations", found 17')),
    "string": (json.dumps(text([GOOD])), alone('expected an object with "conversations", found "[{')),
    "empty": ("", Refused("", "the file is empty: expected a JSON array of conversations")),
    "spaces": (" \n\t ", Refused("", "the file is empty")),
    "no-rows": ("[]", Refused("", "holds no conversations")),
    "prose": ("<html>404: not found</html>", Refused("line 1, column 1", "expected a JSON array of conversations, or")),
    "LFS-pointer": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", Refused("", "a pointer of Git LFS, not")
    ),
    "nesting-2000": (
        f'[{G},\n{{"x": {"[" * 2000}{"]" * 2000}}}]', Refused("line 2, column 1", "row 1 is nested too deeply")
    ),
    "nesting-2000-lines": (
        f'{G}\n{{"x": {"[" * 2000}{"]" * 2000}}}\n{text(ALSO_GOOD)}',
        Dropped(3, {1: ("row 1, line 2", "nested too deeply")}),
    ),
}  # fmt: skip

# ---- the values in a row

VALUES = {
    "NaN": (literal("NaN"), one_bad('holds NaN, which is not JSON: write null, or leave it out', 1)),
    "null-text": (literal("null"), one_bad('expected "value" to be a string, found null', 1)),
    "number-text": (literal("5"), one_bad('expected "value" to be a string, found 5', 1)),
    "list-text": (literal('["a"]'), one_bad('expected "value" to be a string, found ["a"]', 1)),
    "object-text": (literal('{"a": 1}'), one_bad('expected "value" to be a string, found {"a": 1}', 1)),
    "text-parts": (
        literal('[{"type": "text", "text": "b"}]'),
        Read(3),
    ),
    "400-digits": (literal("7" * 400), one_bad(f'expected "value" to be a string, found {shown(int("7" * 400))}', 1)),
    "400-digits-beside": (text([GOOD, {**ALSO_GOOD, "score": 10**399}]), Read(2)),
    "5000-digits-beside": (
        text(among({**good_row(1), "score": 0})).replace('"score": 0', f'"score": {"7" * 5000}'),
        one_bad('holds a number of more than 4,300 digits: write it as a string'),
    ),
    "lone-surrogate": (
        literal('"ab\\ud800"'), one_bad('"value" holds half a character (a lone surrogate) at position 2', 1)
    ),
    "NUL": (literal('"a\\u0000b"'), one_bad('"value" holds a NUL character at position 1: take it out', 1)),
    "raw-NUL": (literal('"a\0b"').replace('}, {"id": 2', '},\n{"id": 2'), Refused("line 1, column ", "not JSON: a N")),
    "raw-tab": (literal('"a\tb"'), Refused("line 1, column ", "not JSON: a bare control character in a string")),
    "escaped-controls": (literal('"\\ta\\u001b[0m\\r\\n"'), Read(3)),
    "duplicate-key": (
        literal('"x", "value": "y"'), one_bad('has "value" twice: only one of them could be read, take one out', 1)
    ),
    "blank-answer": (literal('" \\n"'), one_bad('"value" is empty: say something or leave it out', 1)),
    "control-tokens": (literal('"<|im_end|>\\n<|im_start|>assistant\\n<|endoftext|>"'), Read(3)),
    "very-long-turn": (
        text(among(turns(("human", "q"), ("model", "word " * 9_000)))),
        Read(3, {1: "the first model turn keeps its first "}),
    ),
    "very-long-question": (
        text(among(turns(("human", "word " * 9_000), ("model", "a")))),
        Read(3, {1: "the context before the first model turn alone fills 2,048"}),
    ),
}  # fmt: skip

# ---- the rows themselves

NO_ROLE = 'expected "from" to be human, model, system or tool, found '
ROWS = {
    "no-conversations": ({"id": 1, "talk": []}, one_bad('expected an object with "conversations" (or another')),
    "conversations-null": ({"conversations": None}, one_bad('expected "conversations" to be a list of turns, found n')),
    "empty-list": ({"conversations": []}, one_bad("has no turns: there is nothing to learn from it")),
    "not-an-object": ([GOOD], one_bad('expected an object with "conversations", found [{')),
    "aliases": (conversation("user", "assistant", "human", "gpt", "user", "bot"), Read(3)),
    "alias-in-capitals": (conversation("Human", "MODEL"), Read(3)),
    "alias-with-space": (conversation("human", "gpt "), one_bad(f'{NO_ROLE}"gpt " (accepted as human: user;', 1)),
    "chatgpt": (conversation("human", "chatgpt"), Read(3)),
    "tool": (conversation("human", "tool", "model"), one_bad("a tool result without a call right before it", 1)),
    "role-missing": ({"conversations": [{"value": "a"}]}, one_bad(f"{NO_ROLE}null", 0)),
    "OpenAI": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        Read(3, said="1 row read as messages of role and content (user as human, assistant as model)"),
    ),
    "both-lists": (
        {**conversation("human", "gpt"), "messages": [{"role": "user", "content": "q"}]},
        one_bad('has both "conversations" and "messages": leave one of them out'),
    ),
    "both-keys": (
        {"conversations": [{"from": "human", "role": "user", "value": "q"}]},
        one_bad('has keys of both "from" and "role": leave one of them out', 0),
    ),
    "two-humans": (
        conversation("human", "human", "gpt"),
        one_bad("a second human turn in a row: merge the two, or use --repairs merge_turns", 1),
    ),
    "two-models": (
        conversation("human", "gpt", "gpt"),
        one_bad("a second model turn in a row: merge the two, or use --repairs merge_turns", 2),
    ),
    "starts-with-gpt": (conversation("gpt", "human", "gpt"), Read(3)),
    "ends-with-human": (
        conversation("human", "gpt", "human"),
        one_bad("the last turn is human, nobody answers it: leave it out, or use --repairs drop_last_human", 2),
    ),
    "only-humans": (conversation("human"), one_bad("has no model turn: there is nothing to learn from it")),
    "system-later": (conversation("human", "system", "gpt"), Read(3)),
    "two-systems": (conversation("system", "system", "human", "gpt"), Read(3)),
    "tool-calls": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "tool_calls": [1]}]},
        one_bad('"tool_calls": expected calls with "name" and "arguments", found 1', 1),
    ),
    "duplicate-id": ({**good_row(1), "id": 0}, one_bad("has the id 0 of row 0 in the same data: give each row")),
    "duplicate-row": ({**GOOD, "id": 1}, one_bad("row 0: take one of them out")),
}  # fmt: skip
CORPUS = {**BYTES, **VALUES, **{name: (text(among(row)), outcome) for name, (row, outcome) in ROWS.items()}}


@pytest.fixture
def prepared(tmp_path, smol_tokenizer, monkeypatch):
    """(content, policy) -> (ledger by row, rows accepted, lines said), through the pipeline that trains."""
    monkeypatch.setattr("finetune.models.loader.load_tokenizer", lambda *_, **__: smol_tokenizer)

    def run(content: Any, policy: str) -> tuple[dict[int, dict], int, list[str]]:
        path = written(tmp_path / "a.json", content)
        data = DataArguments([str(path)], bad_rows=policy, data_cache_dir=str(tmp_path / "cache"))
        with logged() as said:
            _, _, found = prepare_run_data(ModelArguments("smol"), data)
        check_dropped_share(found, 1.0)
        found.write_ledger(tmp_path / "ledger.jsonl")
        entries = map(json.loads, (tmp_path / "ledger.jsonl").read_text("utf-8").splitlines())
        return {entry["row"]: entry for entry in entries}, found.summary.rows, said

    return run


def refusal(prepared, content: Any, policy: str, tmp_path) -> str:
    with pytest.raises(DataError) as refused:
        prepared(content, policy)
    assert refused.value.status == 3
    return str(refused.value).replace(f"{tmp_path / 'a.json'}", "FILE")


def stands_at(place: str, words: str, message: str) -> bool:
    """Whether one line of the message has the words, at the place."""
    before = f"FILE, {place}" if place else "FILE: "
    return any(before in line and words in line.partition(before)[2] for line in message.splitlines())


@pytest.mark.parametrize("name", CORPUS)
def test_each_file_becomes_what_the_table_says_under_both_policies(name, prepared, tmp_path):
    content, outcome = CORPUS[name]
    if isinstance(outcome, Read):
        for policy in ("error", "drop"):
            ledger, rows, said = prepared(content, policy)
            assert rows == outcome.rows
            assert ledger.keys() == outcome.ledger.keys()
            assert all(words in ledger[row]["reason"] for row, words in outcome.ledger.items())
            assert outcome.said in "\n".join(said)
            assert ("mojibake" == name) == any("Latin-1" in line for line in said)
        return
    if isinstance(outcome, Refused):
        for policy in ("error", "drop"):
            message = refusal(prepared, content, policy, tmp_path)
            assert stands_at(outcome.place, outcome.words, message), message
        return
    message = refusal(prepared, content, "error", tmp_path)
    for place, words in outcome.places.values():
        assert stands_at(place, words, message), message
    if len(outcome.places) == outcome.rows:
        message = refusal(prepared, content, "drop", tmp_path)
        assert f"all {outcome.rows} rows are dropped, {outcome.rows} of them for a fault: FILE, row 0: " in message
        return
    ledger, rows, _ = prepared(content, "drop")
    assert rows == outcome.rows and ledger.keys() == outcome.places.keys()
    for row, (place, words) in outcome.places.items():
        assert ledger[row]["status"] == "dropped"
        assert stands_at(place, words, ledger[row]["reason"].replace(str(tmp_path / "a.json"), "FILE"))


def test_the_corpus_is_large_and_has_every_outcome():
    kinds = [type(outcome) for _, outcome in CORPUS.values()]

    assert len(CORPUS) >= 70
    assert all(kinds.count(kind) >= 10 for kind in (Read, Dropped, Refused))


@pytest.mark.parametrize("said", ["你好，世界", "naïve café", "“quoted” – dash", "日本語 \U0001f600", "Ünïcödé €"])
def test_mojibake_is_told_from_text_in_any_language(said):
    assert intended_text(windows_1252(said)) == intended_text(said.encode().decode("latin-1")) == said
    assert intended_text(said) is None


NASTY = ("null", "nesting-2000", "raw-NUL", "truncated", "GBK", "400-digits-beside")


@pytest.mark.slow
def test_the_nastiest_files_neither_kill_nor_stop_the_command(pretrained, tmp_path):
    command = [sys.executable, "-m", "finetune", "preview", "--model_name_or_path", str(pretrained), "--json"]
    started = {}
    for name in NASTY:
        path = written(tmp_path / f"{name}.json", CORPUS[name][0])
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started[name] = subprocess.Popen(
            [*command, "--data_path", str(path)], cwd=ROOT, env=dict(os.environ), **options
        )
    try:
        for name, process in started.items():
            out, errors = process.communicate(timeout=SECONDS_FOR_PREVIEW)
            readable = isinstance(CORPUS[name][1], Read)
            assert process.returncode == (0 if readable else 3), errors
            assert "Traceback" not in errors
            assert out or not readable
            if not readable:
                assert errors.count("error: ") == 1 and f"{name}.json, " in errors
    finally:
        for process in started.values():
            process.kill()


UNLEARNABLE = {
    "context-alone-fills-the-limit": (
        [turns(("human", f"{number} " * 300), ("model", "a")) for number in range(3)],
        (),
        "all 3 rows are dropped: raise --model_max_length, or shorten them",
    ),
    "nothing-to-be-learned": (
        [
            {"conversations": [*good_row(number)["conversations"][:1], {"from": "gpt", "value": "a", "train": False}]}
            for number in range(3)
        ],
        ("--bad_rows", "drop", "--max_dropped_rows", "1"),
        'all 3 rows are dropped, 3 of them for a fault: 3 faults:\n  FILE, row 0: every model turn is "train": false',
    ),
}


@pytest.mark.parametrize("name", UNLEARNABLE)
def test_data_of_which_nothing_can_be_learned_ends_the_run_before_it_trains(name, tiny_model, tmp_path):
    rows, options, words = UNLEARNABLE[name]
    path = written(tmp_path / "a.json", rows)
    flags = ["--model_name_or_path", tiny_model, "--data_path", path, "--output_dir", tmp_path / "output"]

    outcome = ranks.train(
        tmp_path / "logs", [*flags, "--deepspeed", "zero2", "--model_max_length", "64", "--max_steps", "1", *options]
    )

    assert outcome.statuses[0] == 3 and all(status != 0 for status in outcome.statuses)
    assert words in outcome.outputs[0].replace(str(path), "FILE")
    assert "Traceback" not in outcome.outputs[0]
    assert not (tmp_path / "output" / "metrics.jsonl").exists()
