"""Tables: CSV and TSV as programs write them, names of columns, Parquet."""

import gzip

import pyarrow
import pyarrow.parquet
import pytest

from finetune.dataset.conversation_reader import ConversationReader, read_conversations
from finetune.dataset.data_sources import find_sources
from tests.helpers.chat_rows import faults, spoken, written
from tests.helpers.rows import CHAT, PAIR


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(("suffix", "mark"), [("csv", ","), ("tsv", "\t")])
def test_cells_are_read_with_delimiters_quotes_and_line_breaks_in_them(suffix, mark, pack, tmp_path):
    lines = [f"question{mark}answer{mark}id", f'"a{mark} ""b""\r\nc"{mark}河\u2028流{mark}7', "", f"d{mark}e{mark}"]
    content = ("\ufeff" + "\r\n".join(lines)).encode()
    path = written(tmp_path / f"a.{suffix}{'' if pack is bytes else '.gz'}", pack(content))

    one, two = read_conversations(path)

    assert spoken(one) == [("human", f'a{mark} "b"\r\nc'), ("model", "河\u2028流")] and one.id == "7"
    assert spoken(two) == [("human", "d"), ("model", "e")] and two.id is None and two.row == 1
    for index in ("", f"{mark}index"):  # as pandas writes its index, and that of the table before
        numbered = f"{index}{mark}question{mark} answer\n0{mark * bool(index)}{mark}q{mark}a\n"
        assert spoken(*read_conversations(written(tmp_path / f"b.{suffix}", numbered))) == PAIR


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("question,answer\nq,a\nq2,a,2\n", "row 1, line 3: has 3 cells, and the first line names 2 columns"),
        ('question,answer\n"q\nq",a\nq3\n', "row 1, line 4: has 1 cells"),
        ("question, answer\nq,a\nquestion,answer\nq2,a\n", "row 1, line 3: names the columns once more"),
        ("question,question\nq,a\n", 'line 1: names the column "question" twice'),
        ("question,answer,\nq,a,note\n", 'row 0, line 2: has "note" in a column without a name'),
        (
            'question,answer\nq,"say \\"hi\\""\n',
            "a quote inside a quoted cell is written twice; row 0 and what follows",
        ),
        ("question,answer\rq,a\r", "a line ends with \\r alone"),
        (b"question,answer\nq,a\n\xe9t\xe9,b\n", "line 3: not UTF-8 (invalid continuation byte)"),
        ('question,answer\nq,"a\n', "line 2: no CSV: unexpected end of data: a quoted cell does not end"),
        ('question,answer\nq,"a"b\n', "line 2: no CSV: "),
        ("question,answer\n", "holds no conversations"),
        ("", "holds no conversations"),
        ("frage,antwort\nq,a\n", "row 0: expected an object with"),
        ("question,answer\nq,\n", 'row 0: expected "answer" to be a string, found null'),
        ("question,answer\nq,a\n".encode("utf-16"), "UTF-16, not UTF-8"),
        ("question,answer\nq,a\n".encode("utf-16-be"), "UTF-16BE, not UTF-8"),
        ("question,answer\n什么是河流，今天,天气很好。\n".encode("gb18030"), "GBK or GB18030, not UTF-8"),
    ],
)
def test_a_broken_table_says_where(content, said, tmp_path):
    found = faults(written(tmp_path / "a.csv", content))

    assert found and said in found[-1], found


@pytest.mark.parametrize(
    "content",
    [
        "question,answer,,\nq,a,,\n",
        "question,answer\nq,a,\n",
        '"question";"answer"\n"q";"a"\n',
        "Question,Answer,ID\nq,a,1\n",
        '[{"question": "q", "answer": "a"}]',
        f'messages,n\n"{CHAT}",1\n',
        "messages;dialogue;text\n;['q', 'a'];\n",
        f'prompt,completion\n"{CHAT[:1]}","{CHAT[1:]}"\n',
        f'prompt,response\n"{CHAT[:1]}",a\n',
        "messages\n\"{'role': ['user', 'assistant'], 'content': ['q', 'a']}\"\n",
        "instruction;output;history\nq;a;[]\n",
        "question;answer;only_last_turn_loss;thinking\nq;a;True;{'budget': 9}\n",
    ],
    ids=lambda content: content[:24],
)
def test_tables_as_spreadsheets_and_pandas_write_them_are_read(content, tmp_path):
    assert spoken(*read_conversations(written(tmp_path / "a.csv", content))) == PAIR


def test_columns_with_other_names_are_named(tmp_path):
    path = written(tmp_path / "a.csv", "Q,A,S,answer,note\nq,a,s,other,n\n")
    reader = ConversationReader(find_sources(str(path), ["question=Q", "answer=A", "system=S"]))
    (one,) = reader

    assert spoken(one) == [("system", "s"), *PAIR]
    assert reader.counts.notes()[-1] == f"{path}: keys not read: column answer (1 row), note (1 row)"
    turns = written(tmp_path / "b.json", [{"talk": CHAT}])
    assert spoken(next(iter(ConversationReader(find_sources(str(turns), ["messages=talk"]))))) == PAIR


def test_a_column_that_no_row_has_is_named(tmp_path):
    path = written(tmp_path / "a.csv", "question,answer,Cot\nq,a,t\n")

    def read_with(*columns: str) -> list:
        return list(ConversationReader(find_sources(str(path), columns)))

    (one,) = read_with("reasoning=Cot")
    assert spoken(one) == PAIR and one.turns[1].reasoning == "t"
    assert read_with("system=S", "reasoning=Cot")[1].faults == (
        '--columns system=S: no row has "S": correct the name, or leave it out',
    )
    reader = ConversationReader(find_sources(str(path)))
    assert len(list(reader)) == 1
    assert reader.counts.notes()[-1].endswith("Cot (1 row); if Cot is reasoning: --columns reasoning=Cot")


def test_a_damaged_page_of_a_parquet_file_is_no_other_text(tmp_path):
    path = tmp_path / "a.parquet"
    rows = pyarrow.Table.from_pylist([{"question": f"question {number}", "answer": "a"} for number in range(50)])
    options = {"compression": "NONE", "use_dictionary": False, "write_page_checksum": True}
    pyarrow.parquet.write_table(rows, path, **options)
    assert len(read_conversations(path)) == 50
    path.write_bytes(path.read_bytes().replace(b"question 7", b"question X"))

    (fault,) = faults(path)
    assert "the Parquet file cannot be read" in fault and "CRC" in fault


def test_a_column_that_stands_twice_in_a_table_is_named(tmp_path):
    table = pyarrow.table([["q"], ["a"], ["b"]], names=["question", "answer", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert 'has the column "answer" twice: only one could be read' in faults(tmp_path / "a.parquet")[0]
