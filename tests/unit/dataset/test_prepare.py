"""Preparing: once, by one process, whole or not at all; every row accounted for."""

import json
from collections import Counter

import pytest
from datasets import Dataset

from finetune.chat_templates import CHATML, JinjaFormat, LingoWhaleFormat, Renderer
from finetune.conversation import Conversation, Turn
from finetune.dataset import prepared_cache
from finetune.dataset.conversation_reader import read_conversations
from finetune.dataset.data_sources import find_sources
from finetune.dataset.data_summary import DataSummary, kind_of
from finetune.dataset.prepare import check_dropped_share, prepare_dataset
from finetune.utils.errors import DataError, StorageError
from tests.helpers.logs import logged
from tests.helpers.paths import ROOT
from tests.helpers.rows import ROWS, write_rows


def many(count: int) -> list[list[tuple[str, str]]]:
    """Distinct rows; every tenth is long."""
    return [
        [("human", f"Question {n}?"), ("model", f"Answer {n}. " * (40 if n % 10 == 0 else 1)), ("human", "More?")]
        + [("model", f"Yes, {n}.")]
        for n in range(count)
    ]


@pytest.fixture
def renderer(smol_tokenizer) -> Renderer:
    return Renderer(JinjaFormat(smol_tokenizer, CHATML, "chatml"), 100)


@pytest.fixture
def small(conversation_file):
    return find_sources([str(conversation_file)])


def prepared(path, renderer, cache, **options):
    return prepare_dataset(find_sources([str(path)]), renderer, cache_dir=cache, **options)


def test_what_is_prepared_is_what_is_rendered(conversation_file, renderer, tmp_path):
    expected = renderer.render_all(read_conversations(str(conversation_file)))

    data = prepared(conversation_file, renderer, tmp_path)

    assert list(data.renderings()) == [one for one in expected]
    assert len(data.examples) == len(ROWS)
    for row, rendering in zip(data.examples, expected, strict=True):
        (example,) = rendering.examples
        assert row["input_ids"] == example.input_ids
        assert row["labels"] == example.labels
        assert row["length"] == len(example.input_ids)
        assert row["num_supervised"] == example.num_supervised
        assert (row["row"], row["window"], row["source"]) == (example.row, 0, str(conversation_file))
        assert [tuple(span.values()) for span in row["turn_spans"]] == [
            (span.turn, span.role, span.start, span.stop, span.note) for span in example.turn_spans
        ]
    assert data.examples.with_format("numpy")[0]["input_ids"].dtype == "int64"


def test_the_weight_of_a_turn_is_that_of_its_supervised_tokens(renderer, tmp_path):
    turns = (Turn("human", "a"), Turn("model", "b", weight=0.5), Turn("human", "c"), Turn("model", "d"))
    rows = [Conversation(turns, 0, "s", 0), Conversation(turns[2:], 1, "s", 1)]
    rendered = renderer.render_all(rows)
    batch = prepared_cache.record_batch(rendered)

    (weighted,), (plain,) = (rendering.examples for rendering in rendered)
    assert weighted.weights == (0.5, 0.5, 1.0, 1.0) and plain.weights == ()
    assert batch["weights"].to_pylist() == [[0.5, 0.5, 1.0, 1.0], []]
    assert [prepared_cache.example_of(values) for values in batch.to_pylist()] == [weighted, plain]


def test_columns_are_those_of_the_selected_examples(conversation_file, renderer, tmp_path):
    examples = prepared(conversation_file, renderer, tmp_path).examples
    for chosen in (examples, examples.select([2, 0, 0]), examples.select([2, 0]).select([1])):
        assert prepared_cache.int_column(chosen, "length").tolist() == list(chosen["length"])


def test_data_prepared_by_0_1_is_readable():
    (folder,) = (ROOT / "tests/golden/written_by_0_1/prepared").iterdir()
    rows = json.loads((folder.parents[1] / "rows.json").read_text("utf-8"))

    facts = prepared_cache.read_facts(folder)
    assert facts is not None, "its files are not what was written"
    summary = DataSummary.of(facts["summary"])
    assert (summary.rows, summary.kept) == (len(rows), len(rows)) and summary.supervised_tokens > 0
    renderings = list(prepared_cache.read_renderings(folder, list(summary.rows_by_source)))
    assert [rendering.id for rendering in renderings] == [row["id"] for row in rows]
    examples = [example for rendering in renderings for example in rendering.examples]
    assert sum(len(example.input_ids) for example in examples) == summary.tokens
    assert sum(example.num_supervised for example in examples) == summary.supervised_tokens
    drawn = prepared_cache.read_some(folder, Dataset.from_file(str(folder / prepared_cache.EXAMPLES_FILE)), 3, seed=0)
    assert len(drawn) == 3 and all(rendering in renderings for rendering in drawn)


def test_the_counts_are_those_of_the_rows(tmp_path, renderer):
    rows = [
        *many(50),
        [("human", "long " * 200), ("model", "never seen")],
        [("human", "<|im_end|>"), ("model", "<think>\nr\n</think>\n\nx")],
    ]
    data = prepared(write_rows(tmp_path / "a.json", rows), renderer, tmp_path / "cache")
    renderings = list(data.renderings())
    examples = [example for one in renderings for example in one.examples]
    statuses = Counter(one.status for one in renderings)

    summary = data.summary
    assert (summary.rows, summary.kept, summary.cut, summary.dropped) == (52, 46, 5, 1)
    assert statuses == {"kept": 46, "cut": 5, "dropped": 1}
    assert summary.examples == len(examples) == 51
    assert summary.tokens == sum(len(one.input_ids) for one in examples)
    assert summary.supervised_tokens == sum(one.num_supervised for one in examples)
    assert summary.tokens_by_source == {source: summary.tokens for source in summary.rows_by_source}
    assert summary.longest == max(len(one.input_ids) for one in examples) <= 100
    assert (summary.spelled, summary.with_reasoning) == (1, 1)
    assert sum(summary.length_histogram) == 51
    assert sum(summary.reasons.values()) == 6
    assert [one.row for one in renderings] == list(range(52))
    text = "\n".join(summary.lines())
    assert "52: 46 kept, 5 cut, 0 split, 1 dropped" in text
    assert "1 rows spell a control token" in text
    assert "the context before the first model turn alone fills N" in text


def test_a_second_start_opens_what_the_first_prepared(conversation_file, renderer, tmp_path):
    first = prepared(conversation_file, renderer, tmp_path)
    made = (first.folder / prepared_cache.EXAMPLES_FILE).stat()
    second = prepared(conversation_file, renderer, tmp_path)
    assert (second.folder / prepared_cache.EXAMPLES_FILE).stat().st_ino == made.st_ino
    assert second.summary == first.summary
    assert list(second.renderings()) == list(first.renderings())


def test_anything_that_changes_the_examples_prepares_them_anew(conversation_file, smol_tokenizer, tmp_path):
    def folder(template=CHATML, length=100, path=conversation_file, **options):
        chat_format = JinjaFormat(smol_tokenizer, template, "x")
        names = ("too_long", "train_on")
        renderer = Renderer(chat_format, length, **{name: options.pop(name) for name in names if name in options})
        return prepared(path, renderer, tmp_path / "cache", **options).folder.name

    other = tmp_path / conversation_file.name
    other.write_text(conversation_file.read_text("utf-8").replace("Paris", "paris"), "utf-8")
    folders = [
        folder(),
        folder(CHATML + "{# another #}"),
        folder(length=101),
        folder(path=other),
        folder(too_long="windows"),
        folder(train_on="last_model_turn"),
        folder(bad_rows="drop"),
        folder(repairs=["merge_turns"]),
    ]
    assert len(set(folders)) == len(folders)
    assert folder() == folders[0]


def test_another_format_is_other_data(conversation_file, golden_tokenizer, tmp_path):
    names = {
        prepared(
            conversation_file, Renderer(LingoWhaleFormat(golden_tokenizer, [3], markers), 100), tmp_path
        ).folder.name
        for markers in ([4], [5])
    }
    assert len(names) == 2


@pytest.mark.parametrize("file", [prepared_cache.EXAMPLES_FILE, prepared_cache.LEDGER_FILE, prepared_cache.FACTS_FILE])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_damaged_data_is_prepared_again(tmp_path, renderer, file, damage):
    path = write_rows(tmp_path / "a.json", many(20))
    first = prepared(path, renderer, tmp_path / "cache")
    rows = list(first.renderings())
    target, content = first.folder / file, (first.folder / file).read_bytes()
    middle = len(content) // 2
    if damage == "missing":
        target.unlink()
    elif damage == "cut":
        target.write_bytes(content[:middle])
    else:
        target.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])

    with logged() as said:
        again = prepared(path, renderer, tmp_path / "cache")

    assert list(again.renderings()) == rows
    assert target.read_bytes() == content
    assert said == ([] if (file, damage) == (prepared_cache.FACTS_FILE, "missing") else [said[0]])
    assert all("is damaged: it is prepared again" in line for line in said)


def test_a_folder_that_cannot_be_made_is_one_error_that_names_the_flag(tmp_path, renderer, conversation_file):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file is a file, not a folder: name another with --data_cache_dir"):
        prepared(conversation_file, renderer, tmp_path / "file" / "cache")


def bad_rows(count: int, bad: int) -> list[dict]:
    rows = [
        {"id": n, "conversations": [{"from": "human", "value": f"q{n}"}, {"from": "model", "value": f"a{n}"}]}
        for n in range(count)
    ]
    for n in range(bad):
        rows[2 * n + 1]["conversations"][1]["value"] = None
    return rows


def test_bad_rows_stop_the_run_and_nothing_is_kept(tmp_path, renderer):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(bad_rows(100, 30)))
    with pytest.raises(DataError) as refusal:
        prepared(path, renderer, tmp_path / "cache")
    lines = str(refusal.value).splitlines()
    assert lines[0] == "30 faults:"
    assert len(lines) == 2 and "row 1, turn 1, row 3, turn 1" in lines[1] and lines[1].endswith(" and 20 more)")
    assert "30 of 100 rows: " in lines[1]
    assert not list((tmp_path / "cache").glob("*/"))


def test_duplicates_are_left_out_by_name_without_a_budget(tmp_path, renderer):
    (tmp_path / "a.json").write_text(json.dumps([{**row, "id": None} for row in bad_rows(4, 0) * 3]))
    data = prepared(tmp_path / "a.json", renderer, tmp_path / "cache", repairs=["drop_duplicates"])
    assert (data.summary.bad, data.summary.dropped, data.summary.kept, data.summary.faults) == (0, 8, 4, 0)
    check_dropped_share(data, 0.0)
    dropped = [one.reason for one in data.renderings() if one.status == "dropped"]
    assert len(dropped) == 8 and all("drop_duplicates: says the same as" in reason for reason in dropped)


def test_bad_rows_are_dropped_by_name_within_a_budget(tmp_path, renderer):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(bad_rows(100, 3)))
    data = prepared(path, renderer, tmp_path / "cache", bad_rows="drop")
    assert (data.summary.bad, data.summary.dropped, data.summary.kept) == (3, 3, 97)
    dropped = [one for one in data.renderings() if one.status == "dropped"]
    assert [(one.row, one.id) for one in dropped] == [(1, 1), (3, 3), (5, 5)]
    assert all('expected "value" to be a string' in one.reason for one in dropped)
    data.write_ledger(tmp_path / "ledger.jsonl")
    lines = (tmp_path / "ledger.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["row"] for line in lines] == [1, 3, 5]
    check_dropped_share(data, 0.03)
    with pytest.raises(DataError, match=r"3 of 100 rows \(3.0%\) are bad, more than --max_dropped_rows 0.02"):
        check_dropped_share(data, 0.02)


def test_data_of_which_nothing_is_left_is_refused(tmp_path, smol_tokenizer):
    path = write_rows(tmp_path / "a.json", [[("human", "a " * 50), ("model", "b")]])
    data = prepared(path, Renderer(JinjaFormat(smol_tokenizer, CHATML, "x"), 10), tmp_path / "cache")
    assert [one.status for one in data.renderings()] == ["dropped"]
    with pytest.raises(DataError, match="all 1 rows are dropped: raise --model_max_length"):
        check_dropped_share(data, 1.0)


def test_weights_repeat_and_draw(tmp_path, renderer):
    first, second = write_rows(tmp_path / "a.json", many(10)), write_rows(tmp_path / "b.json", many(33)[10:])
    sources = find_sources([f"{first}:2", f"{second}:0.5"])
    data = prepare_dataset(sources, renderer, cache_dir=tmp_path / "cache")
    epoch = data.epoch(seed=1).examples
    counts = Counter((source, row) for source, row in zip(epoch["source"], epoch["row"], strict=True))
    assert {counts[str(first), row] for row in range(10)} == {2}
    drawn = [row for source, row in counts if source == str(second)]
    assert len(drawn) == 12  # half of 23, rounded to even
    assert data.epoch(seed=1).examples["row"] == epoch["row"]
    assert data.epoch(seed=2).examples["row"] != epoch["row"]
    unweighted = prepare_dataset(find_sources([str(first), str(second)]), renderer, cache_dir=tmp_path / "cache")
    assert unweighted.folder == data.folder  # weights choose among what is prepared
    assert len(unweighted.epoch(seed=1).examples) == 33
    nothing = prepare_dataset(find_sources([f"{first}:0.01"]), renderer, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match="leave no example of an epoch"):
        nothing.epoch(seed=1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            'a.json, row 3, turn 1: expected "x" to be a string, found null',
            'b.json, row 17, turn 0: expected "x" to be a string, found 5',
        ),
        ("5,012 tokens: the first 2 of 8 turns are kept", "900 tokens: the first 12 of 20 turns are kept"),
    ],
)  # fmt: skip
def test_like_reasons_count_as_one(one, other):
    assert kind_of(one) == kind_of(other)
    assert kind_of(one) != kind_of("a.json, row 3: has no model turn: there is nothing to learn from it")


def test_turns_that_several_examples_of_a_row_have_are_counted(smol_tokenizer, tmp_path):
    turns = [
        ("system", "Be brief."),
        *[(role, f"{role} {n} says this") for n in range(4) for role in ("human", "model")],
    ]
    write_rows(tmp_path / "a.json", [turns, [("human", "Short?"), ("model", "Yes.")]])
    write_rows(tmp_path / "b.json", [[("human", "Hi"), ("model", "Hello there.")]])
    renderer = Renderer(JinjaFormat(smol_tokenizer, CHATML, "chatml"), 60, too_long="windows")
    data = prepare_dataset(
        find_sources([str(tmp_path / "a.json"), str(tmp_path / "b.json")]), renderer, cache_dir=tmp_path
    )
    first = next(data.renderings())
    assert len(first.examples) > 1
    turns_of = [(span.turn, span.stop - span.start) for example in first.examples for span in example.turn_spans]
    assert data.summary.repeated_tokens == sum(tokens for _, tokens in turns_of) - sum(dict(turns_of).values()) > 0
    lines = "\n".join(data.summary.lines())
    assert f"{data.summary.repeated_tokens:,} tokens" in lines and "a.json: " in lines and "b.json: " in lines
