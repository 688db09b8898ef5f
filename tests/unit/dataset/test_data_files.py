"""Bytes on disk -> rows: every kind of file, ways in which one can be broken, and the memory that reading takes."""

import gzip
import json
import re
import tracemalloc
from itertools import product

import pyarrow
import pyarrow.parquet
import pytest

from finetune.conversation import BadRow, Conversation
from finetune.dataset import json_reader
from finetune.dataset.conversation_reader import ConversationReader
from finetune.dataset.data_files import CHUNK_BYTES
from finetune.dataset.data_sources import find_sources
from tests.helpers.chat_rows import HELLO, faults, good_row, read, refusal, spoken, turns, written
from tests.helpers.tiers import mostly_slow

ROWS = [good_row(number) for number in range(3)]
CHINESE = [
    turns(("human", f"今天的天气怎么样？第{number}次"), ("model", "今天的天气很好，适合出去走走。"))
    for number in range(3)
]


def as_array(rows: list) -> bytes:
    return json.dumps(rows, ensure_ascii=False).encode()


def as_lines(rows: list) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


FORMS = {"array": as_array, "lines": as_lines}
PACKINGS = {"plain": bytes, "gzip": gzip.compress, "zstd": zstd}


# ---- what is read


@pytest.mark.parametrize("pack", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "a.gz"])
def test_content_tells_the_kind_of_a_file_not_its_name(name, form, pack, tmp_path):
    path = written(tmp_path / name, pack(b"\xef\xbb\xbf" + form([*ROWS, *CHINESE])))

    found = read(path)

    assert [one.row for one in found] == list(range(6))
    assert [spoken(one)[0][1] for one in found] == [row["conversations"][0]["value"] for row in [*ROWS, *CHINESE]]


def test_gzip_and_zstd_in_several_parts_are_read_to_the_end(tmp_path):
    one, other = as_lines(ROWS[:1]) + b"\n", as_lines(ROWS[1:])

    for number, pack in enumerate((gzip.compress, zstd)):
        assert len(read(written(tmp_path / f"{number}", pack(one) + pack(other)))) == 3


def test_parquet_is_read_with_null_as_absent(tmp_path):
    rows = [{**good_row(number), "tools": None, "system": "s" if number else None} for number in range(600)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    reader = ConversationReader(find_sources([str(path)]))

    found = list(reader)

    assert [(one.row, one.id) for one in found] == [(number, number) for number in range(600)]
    assert [len(one.turns) for one in found] == [2, *[3] * 599]
    assert reader.share_read() == 1.0


def test_maps_of_parquet_are_objects(tmp_path):
    turns = pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.string()))
    for name, more in (("a", []), ("twice", [("from", "gpt")])):
        table = {"conversations": [[[("from", "human"), ("value", "q")], [("from", "model"), ("value", "a"), *more]]]}
        table["conversations"] = pyarrow.array(table["conversations"], turns)
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / f"{name}.parquet")

    (one,) = read(tmp_path / "a.parquet")
    (other,) = read(tmp_path / "twice.parquet")

    assert [(turn.role, turn.text) for turn in one.turns] == [("human", "q"), ("model", "a")]
    assert "duplicate" in other.reason and "row 0 and what follows are lost" in other.reason


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_row_may_be_larger_than_what_is_read_at_once(form, tmp_path):
    long = turns(("human", "é" * CHUNK_BYTES), ("model", "中" * (2 * CHUNK_BYTES)))
    path = written(tmp_path / "a.json", form([ROWS[0], long, ROWS[1]]))

    assert [len(one.turns[1].text) for one in read(path)] == [8, 2 * CHUNK_BYTES, 8]


@pytest.mark.parametrize("shift", range(12))
def test_a_window_may_end_anywhere(shift, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.dataset.data_files.CHUNK_BYTES", 37 + shift)
    rows = [{**row, "score": [-12.5e3, True, None, 1234567890], "note": "\U0001f600 \\"} for row in [*ROWS, *CHINESE]]
    path = written(tmp_path / "a.json", as_array(rows) if shift % 2 else json.dumps(rows, indent=2))

    assert [spoken(one)[1][1] for one in read(path)] == [row["conversations"][1]["value"] for row in rows]


def test_the_share_that_was_read_grows_to_1(tmp_path):
    rows = [turns(("human", f"{number}" * 2_000), ("model", "b")) for number in range(300)]
    paths = [written(tmp_path / "a.json", as_array(rows)), written(tmp_path / "b.gz", gzip.compress(as_lines(ROWS)))]
    reader = ConversationReader(find_sources(list(map(str, paths))))

    shares = [reader.share_read() for _ in reader]

    assert shares == sorted(shares) and len(set(shares)) > 2
    assert reader.share_read() == 1.0


@pytest.mark.parametrize(
    ("form", "pack"),
    mostly_slow(product(FORMS, [bytes, gzip.compress]), [("array", gzip.compress)]),
)
def test_reading_takes_the_memory_of_a_window_not_of_the_file(form, pack, tmp_path):
    text = "some words that are said again and again " * 25
    content = FORMS[form]([turns(("human", f"{number} {text}"), ("model", text)) for number in range(12_000)])
    path = written(tmp_path / "a.json", pack(content))
    size = len(content)
    del content
    tracemalloc.start()
    try:
        count = sum(isinstance(one, Conversation) for one in ConversationReader(find_sources([str(path)])))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert count == 12_000 and size > 24 * CHUNK_BYTES
    assert peak < 12 * CHUNK_BYTES


# ---- JSON that is broken

GOOD = json.dumps(ROWS[0])
BROKEN_ARRAYS = {
    "trailing-comma": (f"[{GOOD},\n]", "line 2, column 1: not JSON: a comma before the closing bracket"),
    "comma-in-row": ('[\n  {"id": 1,}\n]', "line 2, column "),
    "no-comma": (f"[{GOOD}\n{GOOD}]", "line 2, column 1: not JSON: expected a comma or the closing bracket, found '{'"),
    "cut-in-row": (f"[{GOOD},\n{GOOD[:-9]}", "line 2, column "),
    "cut-in-string": (f"[{GOOD},\n{GOOD[:30]}", "line 2, column "),
    "cut-behind-row": (f"[{GOOD}", f"line 1, column {len(GOOD) + 2}: not JSON: the array does not end: was the file"),
    "cut-behind-comma": (f"[{GOOD},", f"line 1, column {len(GOOD) + 3}: not JSON: the text ends in the middle"),
    "two-arrays": (f"[{GOOD}]\n[{GOOD}]", "line 2, column 1: not JSON: content after the closing bracket"),
    "words-behind": (
        f"[{GOOD}] thanks",
        f"line 1, column {len(GOOD) + 4}: not JSON: content after the closing bracket",
    ),
    "single-quotes": ("[{'id': 1}]", "line 1, column 3: not JSON: a single quote"),
    "true": ('[{"id": True}]', "line 1, column 9: not JSON: Expecting value, near "),
    "bare-newline": ('[{"id": "a\nb"}]', "line 1, column 11: not JSON: a bare control character in a string"),
    "zeros": (f"[{GOOD},\0\0\0", f"line 1, column {len(GOOD) + 3}: not JSON: a NUL character"),
    "escape": ('[{"id": "\\x"}]', "line 1, column "),
    "deep": ("[" * 100_000, "line 1, column 2: row "),
    "deep-object": ('[{"a":' + '{"a":' * 100_000, "line 1, column 2: row "),
}


def one_line_on(place: re.Match) -> str:
    """A place in an array once its first line ends behind the bracket."""
    line, column = int(place[1]), place[2]
    return f"line {line + 1}, column {int(column) - (line == 1) if column else ''}"


@pytest.mark.parametrize(("content", "said"), BROKEN_ARRAYS.values(), ids=BROKEN_ARRAYS)
@pytest.mark.parametrize("before", [0, 1], ids=["first", "behind-rows"])
def test_a_syntax_error_ends_an_array_with_its_place(content, said, before, tmp_path):
    if before:
        content = content.replace("[", f"[{json.dumps(ROWS[1])},\n", 1)
        said = re.sub(r"line (\d+), column (\d*)", one_line_on, said)
    path = written(tmp_path / "a.json", content)

    *rows, last = read(path)

    assert isinstance(last, BadRow) and last.row is None
    (fault,) = last.faults
    assert fault.startswith(f"{path}, {said}"), fault
    assert "cannot be read" in fault and len(fault) < len(str(path)) + 300
    assert all(isinstance(one, Conversation) for one in rows) and len(rows) >= before


BROKEN_LINES = {
    "comma": (f"{GOOD},", f"column {len(GOOD) + 1}: not JSON: a comma behind the value"),
    "two": (f"{GOOD} {GOOD}", f"column {len(GOOD) + 2}: not JSON: content after the value"),
    "cut": (GOOD[:-3], f"column {len(GOOD) - 2}: not JSON: the text ends in the middle"),
    "cut-in-string": (GOOD[:-6], "column "),
    "comma-in-row": ('{"id": 1,}', "column "),
    "single-quotes": ("{'id': 1}", "column 2: not JSON: a single quote"),
    "words": ("hello", "column 1: not JSON: Expecting value, near 'hello'"),
}


@pytest.mark.parametrize(("content", "said"), BROKEN_LINES.values(), ids=BROKEN_LINES)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_broken_line_is_the_fault_of_its_row_alone(content, said, place, tmp_path):
    lines = [json.dumps(ROWS[1]), json.dumps(ROWS[2])]
    lines.insert(place, content)
    path = written(tmp_path / "a.jsonl", "\n\n".join(lines) + "\n")

    found = read(path)

    assert [one.row for one in found] == [0, 1, 2]
    assert [isinstance(one, BadRow) for one in found] == [number == place for number in range(3)]
    (fault,) = found[place].faults
    assert fault.startswith(f"{path}, row {place}, line {2 * place + 1}, {said}"), fault


def test_each_broken_line_is_named_beside_the_faulty_rows(tmp_path):
    path = written(tmp_path / "a.jsonl", f'{GOOD}\n{{"conversations": [}}\n{{"id": 1}}\n{"[" * 100_000}\nno\n')

    assert [fault.removeprefix(f"{path}, ").partition(":")[0] for fault in faults(path)] == [
        "row 1, line 2, column 20", "row 2", "row 3, line 4", "row 4, line 5, column 1",
    ]  # fmt: skip


FILE_FAULTS = {
    "empty": ("", ": the file is empty: expected a JSON array of conversations"),
    "blank": (" \n\t\n", ": the file is empty"),
    "only-BOM": (b"\xef\xbb\xbf", ": the file is empty"),
    "no-rows": ("[]", ": holds no conversations"),
    "no-rows-spaced": (" [\n]\n", ": holds no conversations"),
    "null": ("null", ', row 0: expected an object with "conversations", found null'),
    "number": ("17", ', row 0: expected an object with "conversations", found 17'),
    "string": ('"hi"', ', row 0: expected an object with "conversations", found "hi"'),
    "NaN": ("NaN", ", row 0: holds NaN, which is not JSON"),
    "prose": ("human: hello\nmodel: hi", ", line 1, column 1: expected a JSON array of conversations, or one JSON obj"),
    "wrapper": (f'{{"data": [{GOOD}]}}', ', row 0: an object whose "data" holds a list of 1 rows: write them'),
    "indented-wrapper": (f'{{\n "data": [\n{GOOD}]}}', ', row 0: an object whose "data" holds a list of 1 rows'),
    "list-of-others": ('{"data": [{"id": 1}]}', ', row 0, turn 0: expected "from" to be human'),
    "two-indented": ('{\n"id": 1}\n{\n"id": 2}', ", row 0: expected an object with"),
    "cut-object": ('{\n"id": 1,\n', ", line 3, column 1: not JSON: the text ends in the middle"),
    "latin-1": (b'[{"id": "\xe9"}]', ", line 1, column 10: not UTF-8 at byte 9: convert it, for example with iconv"),
    "latin-1-line": (b'{"id": 1}\n{"id": "\xe9"}', ", row 0: expected an object with"),
    "utf-16": ("[{}]".encode("utf-16"), ": the text is UTF-16, not UTF-8: convert it: iconv -f UTF-16 -t UTF-8 "),
    "utf-16-be": ('[{"a":1}]'.encode("utf-16-be"), ": the text is UTF-16BE, not UTF-8: convert it: iconv -f UTF-16BE"),
    "utf-32": ("[{}]".encode("utf-32"), ": the text is UTF-32, not UTF-8: convert it"),
    "gbk-array": (as_array(CHINESE).decode().encode("gbk"), ", line 1, column 49: the text is GBK or "),
    "gbk-lines": (as_lines(CHINESE).decode().encode("gb18030"), ": the text is GBK or GB18030, not UTF-8"),
    "gbk-gzip": (gzip.compress(as_array(CHINESE).decode().encode("gbk")), ", line 1, column 49: the text is GBK or "),
    "zip": (b"PK\x03\x04" + bytes(30), ": a zip archive: unpack it"),
    "xz": (b"\xfd7zXZ\0" + bytes(30), ": an xz file: unpack it"),
    "tar-in-gzip": (gzip.compress(bytes(257) + b"ustar" + bytes(250)), ": a tar archive: unpack it"),
    "gzip-in-gzip": (gzip.compress(gzip.compress(GOOD.encode())), ": a packed file inside a packed file"),
    "not-parquet": (b"PAR1" + bytes(40) + b"PAR1", ": the Parquet file cannot be read ("),
    "packed-nothing": (gzip.compress(b""), ": the file is empty"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "said"), FILE_FAULTS.values(), ids=FILE_FAULTS)
def test_a_file_without_conversations_says_what_it_is_instead(content, said, tmp_path):
    path = written(tmp_path / "a.json", content)

    first, *_ = faults(path)

    assert first.startswith(f"{path}{said}"), first
    assert str(path) in refusal(path)


def test_the_files_behind_a_broken_one_are_read_too(tmp_path):
    broken = written(tmp_path / "a.json", "[{}")
    empty = written(tmp_path / "b.json", "")
    good = written(tmp_path / "c.json", ROWS)

    assert [one.row for one in read(broken, empty, good)] == [0, None, None, 0, 1, 2]


def test_rows_before_a_byte_that_is_not_utf_8_are_read(tmp_path):
    content = as_array(ROWS).replace(b"answer 2", b"\xff")
    array, lines = written(tmp_path / "a.json", content), tmp_path / "b.jsonl"
    written(lines, as_lines([*ROWS, good_row(3)]).replace(b"answer 2", b"\xff"))

    *before, last = read(array)
    assert [one.row for one in before] == [0, 1] and last.row is None
    assert last.faults[0].startswith(
        f"{array}, line 1, column {content.index(bytes([255])) + 1}: not UTF-8 at byte {content.index(bytes([255]))}: "
    )
    assert [isinstance(one, BadRow) for one in read(lines)] == [False, False, True, False]
    byte = lines.read_bytes().index(b"\xff")
    assert faults(lines)[0].startswith(f"{lines}, row 2, line 3: not UTF-8 at byte {byte}: ")


def test_one_line_in_gbk_among_lines_in_utf_8_is_the_fault_of_its_row(tmp_path):
    lines = as_lines(CHINESE).split(b"\n")
    path = written(tmp_path / "a.jsonl", b"\n".join([lines[0], lines[1].decode().encode("gbk"), lines[2]]))

    assert [one.row for one in read(path) if isinstance(one, Conversation)] == [0, 2]
    assert faults(path)[0].startswith(f"{path}, row 1, line 2: not UTF-8 at byte ")


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
def test_a_packed_file_that_is_cut_anywhere_is_never_read_as_whole(pack, tmp_path):
    whole = pack(as_lines(ROWS))

    for length in range(1, len(whole)):
        found = read(written(tmp_path / "a.gz", whole[:length]))
        assert isinstance(found[-1], BadRow), length
        assert len(found[-1].faults) == 1 and str(tmp_path) in found[-1].faults[0]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_is_too_long_to_be_a_row_is_not_read_to_its_end(form, tmp_path, monkeypatch):
    monkeypatch.setattr(json_reader, "MOST_CHARACTERS", 3 * CHUNK_BYTES)
    path = written(tmp_path / "a.json", form([ROWS[0], turns(("human", "x" * (9 * CHUNK_BYTES)), ("model", "y"))]))

    first, last = read(path)

    assert isinstance(first, Conversation) and last.row is None
    assert "longer than 3 Mi" in last.faults[0]


def test_a_syntax_error_stops_the_reading_there(tmp_path, monkeypatch):
    content = as_array([HELLO] * 200_000)
    path = written(tmp_path / "a.json", content[:1000].rpartition(b"{")[0] + b"'" + content[1000:])
    reader = ConversationReader(find_sources([str(path)]))
    seen = [reader.share_read() for _ in reader]

    assert len(content) > 10 * CHUNK_BYTES
    assert max(seen) < 0.2


@pytest.mark.parametrize("key", ["role", "content"])
def test_a_line_that_is_a_list_of_turns_is_one_conversation_also_alone(tmp_path, key):
    """In a file whose name says JSON lines; an array in a .json file holds rows."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    line = json.dumps([{key: turn[key], **turn} for turn in turns])
    (found,) = read(written(tmp_path / "a.jsonl", line))

    assert spoken(found) == [("human", "q"), ("model", "a")]
    assert spoken(read(written(tmp_path / "b.json", f"[{line}]"))[0]) == spoken(found)
    assert "row 0: one message of a conversation" in faults(written(tmp_path / "c.json", line))[0]
    (other,) = read(written(tmp_path / "d.jsonl", json.dumps([{"messages": turns}])))
    assert spoken(other) == spoken(found)
