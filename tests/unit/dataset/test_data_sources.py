"""What --data_path may name, and what is said of names that stand for nothing."""

import os
import shutil
import sys
import types
from pathlib import Path

import datasets
import pytest

from finetune.config.argument_parser import locate_model
from finetune.dataset import data_sources
from finetune.dataset.conversation_reader import read_conversations
from finetune.dataset.data_sources import Source, find_local_sources, find_sources, fingerprint_sources, shipped_files
from finetune.utils.errors import ConfigError, DataError
from tests.helpers.chat_rows import good_row, read, refusal, spoken, written
from tests.helpers.paths import ROOT


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with data/{b.jsonl,a.json,c.parquet,d.json.gz} and things that are no data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "inner").mkdir(parents=True)
    for number, name in enumerate(("b.jsonl", "a.json", "inner/e.json", ".hidden.json", "README.md")):
        written(tmp_path / "data" / name, good_row(number))
    datasets.Dataset.from_list([good_row(7)]).to_parquet("data/c.parquet")
    shutil.copy("data/a.json", "data/d.json.gz")
    return tmp_path


def names(*paths: str) -> list[str]:
    return [source.name for source in find_sources(paths)]


def refused(*paths: str) -> str:
    with pytest.raises(DataError) as raised:
        find_sources(paths)
    return str(raised.value)


def test_a_folder_stands_for_its_data_files_sorted_those_of_folders_in_it_last(folder):
    expected = ["data/a.json", "data/b.jsonl", "data/c.parquet", "data/d.json.gz", "data/inner/e.json"]

    assert names("data") == expected
    assert names("data/inner", "data/b.jsonl") == ["data/inner/e.json", "data/b.jsonl"]
    assert refused("data", "data/inner").startswith("data/inner/e.json: is named twice")


def test_a_glob_stands_for_the_files_that_match(folder):
    assert names("data/*.json*") == ["data/a.json", "data/b.jsonl", "data/d.json.gz"]
    assert refused("data/*.ndjson").startswith("data/*.ndjson: no file matches in ")


def test_a_weight_is_the_number_behind_the_last_colon(folder):
    shutil.copy("data/a.json", "data/a.json:2")
    weights = {
        source.name: source.weight for source in find_sources(["data/b.jsonl:0.5", "data/c.p*:2", "data/a.json:2"])
    }

    assert weights == {"data/b.jsonl": 0.5, "data/c.parquet": 2.0, "data/a.json:2": 1.0}
    assert [source.weight for source in find_sources(["data:3"])] == [3.0] * 5


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "-0.0"])
def test_a_weight_is_above_0(weight, folder):
    assert refused(f"data/a.json:{weight}") == (
        f"data/a.json:{weight}: expected a weight above 0 after the colon, found {weight}"
    )


def test_the_same_file_twice_is_refused_under_whichever_name(folder):
    os.symlink("a.json", "data/z.json")

    assert refused("data/a.json", "data/a.json").startswith("data/a.json: is named twice: leave one out")
    assert refused("data/a.json", "data/../data/a.json").startswith(
        "data/../data/a.json: is named twice, as data/a.json"
    )
    assert refused("data").startswith("data/z.json: is named twice, as data/a.json too: leave one out")


def test_globs_look_into_all_folders_and_the_home_folder_is_known(folder, monkeypatch):
    Path("data/deep/er").mkdir(parents=True)
    written(Path("data/deep/er/d.jsonl"), "")
    monkeypatch.setenv("HOME", str(Path("data").absolute()))

    assert [source.name for source in find_sources("data/**/*.jsonl")] == ["data/b.jsonl", "data/deep/er/d.jsonl"]
    assert find_sources("~/a.json:2")[0].weight == 2


def test_all_faults_of_all_names_are_found(folder):
    os.mkdir("nothing")

    lines = refused("no.json", "nothing", "data/b.jsonl:0", "x*.json", "data/a.json").splitlines()

    assert lines[0] == "4 faults:"
    assert [line.strip().partition(": ")[0] for line in lines[1:]] == [
        "no.json",
        "nothing",
        "data/b.jsonl:0",
        "x*.json",
    ]


def test_a_folder_without_data_says_what_it_looked_for_and_found(folder):
    os.mkdir("nothing")
    written(Path("nothing/notes.txt"), "hello")

    assert refused("nothing") == (
        "nothing: the folder holds no data: expected files that end in .json, .jsonl, .ndjson, .parquet, .csv, "
        ".tsv "
        "(or these with .gz or .zst), found notes.txt"
    )


def test_folders_in_a_folder_are_read_but_for_models_and_hidden_ones(folder):
    for name in (
        "nest/a.json",
        "nest/deep/b.jsonl",
        "nest/.git/c.json",
        "nest/model/config.json",
        "nest/model/x/d.json",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        written(Path(name), "")

    assert [source.name for source in find_sources("nest")] == ["nest/a.json", "nest/deep/b.jsonl"]
    for name in ("state.json", "dataset_info.json"):
        written(Path("nest/deep") / name, "{}")
    assert refused("nest").startswith("nest/deep: is a data set that save_to_disk wrote")


def test_a_name_that_is_not_utf_8_is_refused(folder):
    written(Path(os.fsdecode(b"data/\xff.jsonl")), "")

    assert refused("data") == "'data/\\udcff.jsonl': the name is not UTF-8, as records of runs are: rename it"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.ZIP", "a zip archive: unpack it and name the files in it"),
        ("a.tar.gz", "a tar archive: unpack it"),
        ("a.xlsx", "a spreadsheet: write it as CSV"),
    ],
)
def test_kinds_of_files_that_are_not_read_are_refused_by_name(name, said, tmp_path):
    path = written(tmp_path / name, "x")

    assert refused(str(path)).startswith(f"{path}: {said}")


def test_a_missing_file_names_those_that_are_shipped(tmp_path):
    message = refusal(tmp_path / "mine.json")

    assert message.startswith(f"{tmp_path / 'mine.json'}: there is no such file; ")
    for name in ("identity.json", "conversations.json"):
        assert str(ROOT / "data" / name) in message


@pytest.mark.parametrize(
    "name", ["data/mine.json", "data/mine", "elsewhere/mine.jsonl.gz", "x" * 300, "a/b/c", "no.json:x"]
)
def test_a_name_that_looks_like_a_file_is_no_name_on_a_hub(name, folder):
    assert refused(name).startswith(f"{name}: there is no such file; ")


@pytest.mark.parametrize("sign", [",", ", ", "\uff0c", " "])
def test_several_files_in_one_word_are_taken_apart_for_the_user(sign, folder):
    message = refused(f"data/a.json{sign}data/b.jsonl")

    assert "with spaces between them: data/a.json data/b.jsonl; in a recipe as [data/a.json, data/b.jsonl]" in message
    assert "there is no such file" in refused(f"data/a.json{sign}data/none.jsonl")


def test_a_link_that_leads_nowhere_is_told_from_a_missing_file(folder, tmp_path):
    (tmp_path / "there.json").symlink_to("gone.json")

    assert "there.json: is a link to gone.json, which does not exist; " in refusal(tmp_path / "there.json")


@pytest.mark.parametrize("name", ["$DATA/a.json", "data/${NAME}.json"])
def test_a_variable_that_no_shell_replaced_is_said(name, folder):
    assert f"{name}: there is no such file: a variable is replaced by the shell alone" in refused(name)


def test_the_file_of_the_published_command_is_known_not_to_be_shipped():
    message = refused("finetune/data/coig_10k.json")

    assert message.startswith("finetune/data/coig_10k.json: COIG's 10,000 conversations are not part of this project; ")
    assert str(ROOT / "data" / "identity.json") in message


def test_several_paths_are_read_in_their_order(folder):
    assert [(one.source, one.row) for one in read_conversations(["data/b.jsonl", "data/c.parquet", "data/a.json"])] == [
        ("data/b.jsonl", 0), ("data/c.parquet", 0), ("data/a.json", 0),
    ]  # fmt: skip


# ---- saved data sets and hubs


def test_a_saved_data_set_is_read_and_of_several_splits_train(tmp_path):
    rows = [good_row(number) for number in range(300)]
    one, several, alone = (str(tmp_path / name) for name in ("one", "several", "alone"))
    datasets.Dataset.from_list(rows).select(range(299, -1, -1)).save_to_disk(one)
    splits = {"test": datasets.Dataset.from_list(rows[:3]), "train": datasets.Dataset.from_list(rows)}
    datasets.DatasetDict(splits).save_to_disk(several)
    datasets.DatasetDict({"chat": splits["train"]}).save_to_disk(alone)

    assert [found.id for found in read(one)] == list(range(299, -1, -1))
    assert len(read(several)) == len(read(alone)) == 300
    assert spoken(read(alone)[7])[1] == ("model", "answer 7")
    assert all(source.num_bytes > 1_000 for source in find_sources([one, several]))


def test_a_saved_data_set_with_no_train_split_names_those_that_it_has(tmp_path):
    part = datasets.Dataset.from_list([good_row(0)])
    datasets.DatasetDict({"sft": part, "test": part}).save_to_disk(str(tmp_path / "a"))

    assert refused(str(tmp_path / "a")) == (
        f"{tmp_path / 'a'}: expected a split called train, or one alone, found sft, test: name the folder of one, "
        f"for example {tmp_path / 'a'}/sft"
    )
    assert len(read(tmp_path / "a" / "sft")) == 1


def test_a_damaged_saved_data_set_is_a_data_error(tmp_path):
    datasets.Dataset.from_list([good_row(0)]).save_to_disk(str(tmp_path / "a"))
    written(tmp_path / "a" / "state.json", "{")

    assert refused(str(tmp_path / "a")).startswith(f"{tmp_path / 'a'}: the saved data set does not load: ")


def test_a_name_on_the_hub_is_loaded_with_its_configuration_and_split(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []

    def load(*given, split):
        asked.append((*given, split))
        part = datasets.Dataset.from_list([good_row(len(asked))])
        return part if split else datasets.DatasetDict({"train": part})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")

    found = read("owner/chats", "owner/chats:test", "owner/chats:small/train:2")

    assert asked == [("owner/chats", None, None), ("owner/chats", None, "test"), ("owner/chats", "small", "train")]
    assert [one.source for one in found] == ["owner/chats", "owner/chats:test", "owner/chats:small/train"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("oss2://bucket/a.json", "oss2:// is no known kind of address"),
        ("https://huggingface.co/datasets/owner/chats", "is the page of a data set: write its name, owner/chats"),
        ("https://mirror.example/datasets/owner/chats/", "write its name, owner/chats"),
        ("gs://bucket/a.json:2", "gs:// needs a package that is missing: pip install gcsfs"),
        ("modelscope:chats:2", "modelscope:chats: expected modelscope:owner/name"),
    ],
)
def test_an_address_is_checked_without_the_network(name, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setattr(data_sources, "fetch", None)
    for names in ([name], []), ([], [name]):
        with pytest.raises(DataError) as refused:
            find_local_sources(*names)
        assert said in str(refused.value)
    assert find_local_sources(["https://host.example/datasets/a.json", "hf://datasets/owner/chats/a.json"], []) == (
        [],
        [],
    )


def test_modelscope_without_its_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert refused("modelscope:owner/chats").endswith("a package that is missing: pip install 'modelscope>=1.18'")
    assert refused("modelscope:chats") == "modelscope:chats: expected modelscope:owner/name"


def test_modelscope_files_are_read_under_the_name_that_was_given(monkeypatch, folder):
    """Its package is not installed here: a stand-in that 'downloads' as `dataset_snapshot_download` does."""
    package, hub, errors, download = (types.ModuleType(name) for name in ("modelscope", "hub", "errors", "download"))
    package.hub, hub.errors, errors.NotExistError = hub, errors, type("NotExistError", (Exception,), {})

    def snapshot(name):
        if name == "owner/gone":
            raise errors.NotExistError("no such data set\nmore")
        return str(folder / "data")

    download.dataset_snapshot_download = download.snapshot_download = snapshot
    for name, module in {"": package, ".hub": hub, ".hub.errors": errors, ".hub.snapshot_download": download}.items():
        monkeypatch.setitem(sys.modules, f"modelscope{name}", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: package)

    sources = find_sources(["modelscope:owner/chats:0.5"])

    assert [(source.name, source.weight) for source in sources][:2] == [
        ("modelscope:owner/chats/a.json", 0.5), ("modelscope:owner/chats/b.jsonl", 0.5),
    ]  # fmt: skip
    assert sources[0].location == str(folder / "data" / "a.json")
    assert "no such data set: check" in refused("modelscope:owner/gone")
    assert locate_model(given := {"model_name_or_path": "modelscope:owner/model"}) == []
    assert given["model_name_or_path"] == str(folder / "data")
    with pytest.raises(ConfigError, match="modelscope:owner/gone: the model cannot be loaded"):
        locate_model({"model_name_or_path": "modelscope:owner/gone"})


# ---- fingerprint


def test_the_fingerprint_is_of_the_content_in_its_order(tmp_path):
    one, other = (written(tmp_path / name, [good_row(number)]) for number, name in enumerate(("a.json", "b.json")))
    copy = written(tmp_path / "copy.json", one.read_bytes())

    def of(*paths: Path) -> str:
        return fingerprint_sources([Source(str(path)) for path in paths])

    assert of(one) == of(copy) and len(of(one)) == 32
    assert len({of(one), of(other), of(one, other), of(other, one)}) == 4
    before = of(one)
    written(one, one.read_bytes() + b" ")
    assert of(one) != before
    with pytest.raises(DataError, match="gone.json: cannot be read: No such file"):
        of(tmp_path / "gone.json")


def test_the_fingerprint_of_a_saved_data_set_goes_with_its_folder(tmp_path):
    rows = datasets.Dataset.from_list([good_row(0), good_row(1)])
    rows.save_to_disk(str(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    rows.select([1, 0]).save_to_disk(str(tmp_path / "c"))

    digests = [fingerprint_sources(find_sources([str(tmp_path / name)])) for name in "abc"]

    assert digests[0] == digests[1] != digests[2]


def test_the_shipped_files_are_found():
    assert [path.name for path in shipped_files()] == ["identity.json", "conversations.json"]
