"""Checkpoints as files: what a manifest proves, what rotation may touch, what does not belong to it."""

import errno
import hashlib
import hmac
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune import checkpoint
from finetune.checkpoint import resume
from finetune.checkpoint.manifest import DAY
from finetune.utils.errors import CheckpointError, ConfigError
from tests.helpers.checkpoint_files import MANIFEST, newest_verified, sealed


def test_who_may_read_the_folder_may_read_the_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "model.safetensors").chmod(0o600)
    tmp_path.chmod(0o750)
    checkpoint.fsync_and_hash(tmp_path, ["model.safetensors"], None)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_manifest_names_every_file_and_comes_back_as_it_was(tmp_path):
    folder = sealed(tmp_path, 4)
    found = checkpoint.read_manifest(folder)
    assert replace(found, files={}) == MANIFEST
    on_disk = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(found.files) == on_disk - {"manifest.json"} and len(found.files) == 5
    for name, record in found.files.items():
        content = (folder / name).read_bytes()
        assert (record.size, record.xxh3_128) == (len(content), xxhash.xxh3_128_hexdigest(content))
    assert (
        found.size
        == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        - (folder / "manifest.json").stat().st_size
    )
    assert checkpoint.verify_checkpoint(folder) == [] and newest_verified(tmp_path) == folder


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), which=st.integers(0, 4))
def test_every_flipped_bit_is_found_and_its_file_is_named(tmp_path_factory, place, bit, which):
    folder = sealed(tmp_path_factory.mktemp("bits"), 4)
    name = sorted(checkpoint.read_manifest(folder).files)[which]
    content = bytearray((folder / name).read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    (folder / name).write_bytes(content)
    (fault,) = checkpoint.verify_checkpoint(folder)
    assert str(folder / name) in fault and "changed since it was written" in fault


def damaged_in_every_way() -> dict:
    def shard(folder: Path) -> Path:
        return next(folder.glob("global_step*/*.pt"))

    def wrong(folder: Path, **values: object) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return {
        "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        "not json": (lambda folder: (folder / "manifest.json").write_text("{"), "cannot be read"),
        "another format": (lambda folder: (folder / "manifest.json").write_text('{"format": 9}'), "format 9"),
        "no object": (lambda folder: (folder / "manifest.json").write_text("[]"), "format None"),
        "nothing in it": (lambda folder: (folder / "manifest.json").write_text('{"format": 1}'), "not a manifest"),
        "cut shard": (lambda folder: cut(shard(folder)), "_optim_states.pt has"),
        "no shard": (lambda folder: shard(folder).unlink(), "_optim_states.pt is missing"),
        "empty latest": (lambda folder: (folder / "latest").write_text(""), "latest has 0 bytes"),
        "no rng": (lambda folder: (folder / "rng_state_0.pth").unlink(), "rng_state_0.pth is missing"),
        "zeroed end": (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:-64] + bytes(64)
            ),
            "model.safetensors has been changed",
        ),
        "a step of another": (lambda folder: wrong(folder, step=7), "it is of step 7: give the folder its name"),
        "a rank too few": (lambda folder: wrong(folder, loss_since_log=[0.5]), "world size do not match"),
        "no ranks": (lambda folder: wrong(folder, disks=[[0]]), "world size do not match"),
        "ranks of one disk": (lambda folder: wrong(folder, disks=[[0], 1]), "disks is [[0], 1]"),
        "a stage of no ZeRO": (lambda folder: wrong(folder, facts={"ZeRO stage": [2]}), "an unknown ZeRO stage"),
        "rows that are none": (
            lambda folder: wrong(folder, facts={"rows left out by --skip_rows": [[1]]}),
            "rows that are no names",
        ),
        "a date of none": (lambda folder: wrong(folder, facts={DAY: "tomorrow"}), "tomorrow"),
        "no date": (lambda folder: wrong(folder, facts={DAY: [1]}), "must be str"),
        "no weights": (lambda folder: wrong(folder, trained=None), "trained is None"),
        "a folder instead": (
            lambda folder: ((folder / "latest").unlink(), (folder / "latest").mkdir()),
            "latest is missing",
        ),
    }


@pytest.mark.parametrize("way", damaged_in_every_way())
def test_each_damage_is_one_fault_that_names_its_file_and_the_older_checkpoint_is_the_latest(tmp_path, way):
    older, newer = sealed(tmp_path, 4), sealed(tmp_path, 6)
    damage, said = damaged_in_every_way()[way]
    damage(newer)
    (fault,) = checkpoint.verify_checkpoint(newer)
    assert said in fault and str(newer) in fault
    assert newest_verified(tmp_path) == older


def test_what_the_disk_has_not_taken_has_no_record(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    real = os.fsync

    def refuse(descriptor: int) -> None:
        if os.fstat(descriptor).st_size == 100:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    assert set(checkpoint.fsync_and_hash(tmp_path, ["model.safetensors"], 0)) == {"model.safetensors"}
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.fsync_and_hash(tmp_path, ["model.safetensors"], 0)


def test_a_path_out_of_the_folder_is_no_manifest(tmp_path):
    folder = sealed(tmp_path, 4)
    values = json.loads((folder / "manifest.json").read_text())
    values["files"]["../secret"] = values["files"]["latest"]
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="secret lies outside"):
        checkpoint.read_manifest(folder)


def test_rotation_leaves_everything_but_its_own_old_checkpoints(tmp_path):
    ours = [sealed(tmp_path, step) for step in (2, 4, 6, 8, 10)]
    elsewhere = sealed(tmp_path / "elsewhere", 1)
    foreign = sealed(tmp_path, 3, run_id="another")
    (tmp_path / "checkpoint-1").symlink_to(elsewhere)
    decoys = [tmp_path / name for name in ("checkpoint-best", "checkpoint-7-backup", "checkpoint-5", "checkpoint-07")]
    for decoy in decoys:
        decoy.mkdir()
        (decoy / "mine.txt").write_text("mine")
    (tmp_path / "checkpoint-9").write_text("a file")

    removed = checkpoint.rotate(tmp_path, run_id=MANIFEST.run_id, keep=2, keep_also=(4,))

    assert [one.name for one in removed] == ["checkpoint-6", "checkpoint-2"]
    assert [one.exists() for one in ours] == [False, True, False, True, True]
    assert all((decoy / "mine.txt").read_text() == "mine" for decoy in decoys)
    assert (tmp_path / "checkpoint-9").read_text() == "a file"
    assert checkpoint.steps_in(tmp_path) == [10, 8, 5, 4, 3]
    assert checkpoint.verify_checkpoint(elsewhere) == [] and checkpoint.verify_checkpoint(foreign) == []
    assert checkpoint.rotate(tmp_path, run_id=MANIFEST.run_id, keep=None) == []
    assert checkpoint.rotate(tmp_path, run_id=MANIFEST.run_id, keep=0) == []


def test_rotation_does_not_follow_links_inside_a_checkpoint(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    folder = sealed(tmp_path / "run", 2)
    (folder / "link").symlink_to(outside)
    sealed(tmp_path / "run", 4)
    checkpoint.rotate(tmp_path / "run", run_id=MANIFEST.run_id, keep=1)
    assert not folder.exists() and (outside / "precious").read_text() == "x"


def test_an_interrupted_removal_is_no_checkpoint_and_is_finished_later(tmp_path, monkeypatch):
    folder = sealed(tmp_path, 2)
    before = len(list(folder.rglob("*")))

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.remove_checkpoint(folder)
    monkeypatch.undo()
    assert len(list(folder.rglob("*"))) == before  # nothing is gone yet, and it is none any more
    assert checkpoint.is_unfinished(folder) and newest_verified(tmp_path) is None
    assert checkpoint.remove_unfinished(tmp_path) == [folder] and not folder.exists()


def test_only_what_a_save_left_is_removed_at_the_next_start(tmp_path):
    whole = sealed(tmp_path, 2)
    started = checkpoint.checkpoint_folder(tmp_path, 4)
    checkpoint.mark_as_unfinished(started, "run", 4)
    (started / "model.safetensors").write_bytes(b"half")
    users = checkpoint.checkpoint_folder(tmp_path, 6)
    users.mkdir()
    assert checkpoint.remove_unfinished(tmp_path) == [started]
    assert whole.is_dir() and users.is_dir() and not started.exists()
    checkpoint.mark_as_unfinished(tmp_path / "elsewhere", "run", 4)
    assert not checkpoint.is_unfinished(tmp_path / "elsewhere")  # whatever bears another name is never removed


def test_what_is_set_aside_keeps_its_content_and_never_replaces_anything(tmp_path):
    asides = set()
    for _ in range(3):
        folder = sealed(tmp_path, 4)
        asides.add(checkpoint.quarantine(folder, "damaged"))
    assert len(asides) == 3 and checkpoint.steps_in(tmp_path) == []
    assert all(len(list(aside.iterdir())) == 6 for aside in asides)


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_ranks_share_the_files_of_a_checkpoint_each_looked_at_once(tmp_path, of):
    manifest = checkpoint.read_manifest(sealed(tmp_path, 4))
    shares = [checkpoint.partition_files(manifest, manifest.files, part, of) for part in range(of)]
    assert sorted(name for share in shares for name in share) == sorted(manifest.files)


def test_a_checkpoint_over_two_disks_is_whole_with_one_part_or_with_both(tmp_path):
    """Each disk holds the files that all have, and the shards of its own ranks."""
    folder = sealed(tmp_path, 4)
    shards = [f"global_step4/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
    (folder / shards[1]).write_bytes((folder / shards[0]).read_bytes())
    files = checkpoint.fsync_and_hash(folder, {*checkpoint.file_names(folder)} - {*shards}, None)
    for rank, name in enumerate(shards):
        files |= checkpoint.fsync_and_hash(folder, [name], rank)
    checkpoint.write_manifest(folder, replace(MANIFEST, files=files, disks=[[0], [1]]))
    manifest = checkpoint.read_manifest(folder)
    assert sorted(manifest.names_for([1])) == sorted({*files} - {shards[0]})
    assert sorted(manifest.names_for([0, 1])) == sorted(files) and checkpoint.verify_checkpoint(folder) == []
    (folder / shards[0]).unlink()
    assert checkpoint.verify_checkpoint(folder) == []
    (folder / shards[1]).unlink()
    assert len(checkpoint.verify_checkpoint(folder)) == 1
    (folder / "latest").unlink()
    assert len(checkpoint.verify_checkpoint(folder)) == 2


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


STRANGERS = {
    "latest is absolute": lambda folder: (folder / "latest").write_text(str(folder.parent / "evil")),
    "latest goes up": lambda folder: (folder / "latest").write_text("../evil"),
    "latest ends in a line": lambda folder: (folder / "latest").write_text("global_step4\n"),
    "latest of another step": lambda folder: (folder / "latest").write_text("global_step5"),
    "scaler.pt": lambda folder: (folder / "scaler.pt").touch(),
    "adapter_model.bin": lambda folder: (folder / "Adapter_Model.BIN").touch(),
    "model code": lambda folder: (folder / "modeling.py").touch(),
    "a file in a subfolder": lambda folder: (folder / "global_step4" / "notes").touch(),
    "a linked shard": lambda folder: linked(next(folder.glob("global_step4/*.pt"))),
    "a linked folder": lambda folder: linked(folder / "global_step4"),
    "a link to a folder": lambda folder: (folder / "deepspeed").symlink_to("/tmp"),
    "a linked manifest": lambda folder: linked(folder / "manifest.json"),
}


@pytest.mark.parametrize("case", STRANGERS)
@pytest.mark.parametrize("sealed_again", [False, True], ids=["as found", "with a manifest that fits"])
def test_what_the_manifest_does_not_name_is_a_fault(tmp_path, case, sealed_again):
    older, folder = sealed(tmp_path, 2), sealed(tmp_path, 4)
    (folder / "README.md").write_text("mine")
    (folder / "evaluation.json").write_text("{}")
    assert newest_verified(tmp_path) == folder
    manifest = checkpoint.read_manifest(folder)
    STRANGERS[case](folder)
    if sealed_again and case != "a linked manifest":
        names = [name for name in manifest.files if (folder / name).is_file()]
        files = checkpoint.fsync_and_hash(folder, names, None)
        checkpoint.write_manifest(folder, replace(manifest, files=files))
    assert newest_verified(tmp_path) == older
    if "latest" in case or "linked" in case:
        with pytest.raises(CheckpointError, match="latest|link"):
            checkpoint.MasterWeights(folder)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x", "a/../x", "./x", "a//x", "a/", "a\\x", "x\n", "x.", "x ", "LATEST", "Manifest.json", ""],
)
def test_names_of_a_manifest_are_plain_paths(tmp_path, name):
    folder = sealed(tmp_path, 4)
    manifest = checkpoint.read_manifest(folder)
    files = {**manifest.files, name: manifest.files["latest"]}
    checkpoint.write_manifest(folder, replace(manifest, files=files))
    with pytest.raises(CheckpointError, match="lies outside|differ only in case"):
        checkpoint.read_manifest(folder)


def test_a_manifest_that_is_changed_in_any_way_is_damaged(tmp_path):
    """Bytes, and values with a checksum that fits: damaged, or the same manifest; never another error."""
    folder = sealed(tmp_path, 4)
    path = folder / "manifest.json"
    text, manifest, draw, damaged = path.read_bytes(), checkpoint.read_manifest(folder), random.Random(0), 0
    nest, values = b"[" * 100_000 + b"]" * 100_000, json.loads(text)
    pieces = [b"", b"\xff", b"NaN", b"1e999", b"9" * 5000, b"-", b'"', b"{", b"\\ud800", b"null", nest, b"\x00"]
    junk = [None, True, -1, 2**70, 1e308, "x\ud800", [], {}, [[0]], {"a": {}}, json.loads("[" * 200 + "]" * 200)]
    for number in range(300):
        if number % 2:
            begin = draw.randrange(len(text))
            path.write_bytes(text[:begin] + draw.choice(pieces) + text[begin + draw.randrange(40) :])
        else:
            changed = {**values, draw.choice([*values, "new"]): draw.choice(junk)}
            changed |= {} if number % 4 else {"checksum": None}
            path.write_text(json.dumps(changed))
        try:
            read = checkpoint.read_manifest(folder)
        except CheckpointError as error:
            damaged += 1
            assert str(path) in str(error) and len(str(error)) < len(str(path)) + 400
            assert checkpoint.verify_checkpoint(folder) == [str(error)]
        else:
            assert read == manifest or number % 4 == 0
    assert damaged > 270
    path.write_bytes(text.replace(b'"step": 4', b'"step": 4, "step": 4'))
    with pytest.raises(CheckpointError, match="is given twice"):
        checkpoint.read_manifest(folder)
    path.write_bytes(text.replace(b'"torch": "2.13.0"', b'"torch": "2.13.1"'))
    with pytest.raises(CheckpointError, match="its checksum is of another text"):
        checkpoint.read_manifest(folder)


def test_with_a_key_a_manifest_that_another_has_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("OUR_KEY", "k" * 16)
    key = checkpoint.key_of("OUR_KEY")
    folder = sealed(tmp_path, 4)
    assert checkpoint.verify_checkpoint(folder) == []
    (fault,) = checkpoint.verify_checkpoint(folder, key)
    assert "its HMAC is missing" in fault
    manifest = checkpoint.read_manifest(folder)
    checkpoint.write_manifest(folder, manifest, key)
    assert "no SHA-256" in checkpoint.verify_checkpoint(folder, key)[0]
    files = checkpoint.fsync_and_hash(folder, manifest.files, None, with_sha256=True)
    checkpoint.write_manifest(folder, replace(manifest, files=files), key)
    assert checkpoint.verify_checkpoint(folder, key) == checkpoint.verify_checkpoint(folder) == []
    assert "its HMAC" in checkpoint.verify_checkpoint(folder, b"another key, which is long enough")[0]
    assert files["latest"].sha256 == hashlib.sha256(b"global_step4").hexdigest()
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    body = {name: value for name, value in values.items() if name not in ("checksum", "hmac_sha256")}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert values["hmac_sha256"] == hmac.new(key, text, "sha256").hexdigest()
    assert values["checksum"] == xxhash.xxh3_128_hexdigest(text)
    path.write_text(json.dumps({**values, "last_logged": 2, "checksum": None}))
    assert checkpoint.verify_checkpoint(folder) == [] and len(checkpoint.verify_checkpoint(folder, key)) == 1


@pytest.mark.parametrize("value", [None, "", "k" * 15])
def test_a_key_that_is_missing_or_short_is_refused_and_not_repeated(monkeypatch, value):
    monkeypatch.delenv("OUR_KEY", raising=False) if value is None else monkeypatch.setenv("OUR_KEY", value)
    with pytest.raises(ConfigError, match="--verify_key: expected the name") as raised:
        checkpoint.key_of("OUR_KEY")
    assert "OUR_KEY" not in str(raised.value) and "kkk" not in str(raised.value)
    assert checkpoint.key_of(None) is None


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000, "[]", "1", "", '{"global_step": 5}', '{"global_step": 4, "log_history": [1]}',
        '{"global_step": "4"}', '{"global_step": 4, "total_flos": "x"}', '{"global_step": 4, "epoch": NaN}',
    ],
)  # fmt: skip
def test_a_record_of_the_trainer_that_it_has_not_written_is_damage(tmp_path, monkeypatch, text):
    monkeypatch.setattr(resume, "get_rank", lambda: 0)
    folder = sealed(tmp_path, 4)
    assert resume._inspect_here(folder, (0,), None, all_files=True)[1] == []
    (folder / "trainer_state.json").write_text(text)
    files = checkpoint.fsync_and_hash(folder, checkpoint.file_names(folder), None)
    checkpoint.write_manifest(folder, replace(MANIFEST, files=files))
    (fault,) = resume._inspect_here(folder, (0,), None, all_files=True)[1]
    assert "trainer_state.json is not the Trainer's record" in fault
