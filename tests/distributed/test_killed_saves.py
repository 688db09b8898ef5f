"""Saves that are killed, disks that are full, files that are doctored: at every instant a checkpoint can be gone on
from, and what is not whole is never loaded."""

import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from finetune import checkpoint
from tests.helpers import ranks, runs
from tests.helpers.checkpoint_files import newest_verified
from tests.helpers.rows import write_rows

pytestmark = pytest.mark.faults

FLAGS = (
    "--num_train_epochs 2 --learning_rate 1e-2 --logging_steps 1 --save_strategy steps --save_steps 2 "
    "--save_total_limit 1 --use_cpu True --per_device_train_batch_size 2 --resume_from_checkpoint auto "
    "--write_report False"
).split()
KINDS = {
    "zero2-lora": ("--deepspeed", "zero2", "--use_lora", "True"),
    "zero3-full": ("--deepspeed", "zero3"),
}
WRITTEN = (
    "optim_states.pt", "model_states.pt", "model.safetensors", "rng_state", "scheduler.pt", "latest", "manifest.json",
    "saving.json", "rotation",
)  # fmt: skip


@pytest.fixture(scope="module")
def argv(tmp_path_factory, tiny_model):
    data = write_rows(tmp_path_factory.mktemp("data") / "rows.json", runs.ROWS)

    def named(output: Path, *flags: object) -> list[str]:
        return [*map(str, ["--model_name_or_path", tiny_model, "--data_path", data, "--output_dir", output])] + [
            *FLAGS,
            *map(str, flags),
        ]

    return named


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, argv):
    """What the runs of a kind come to when nothing happens to them."""
    found = {}

    def of(kind: str) -> tuple[str, list]:
        if kind not in found:
            folder = tmp_path_factory.mktemp("whole")
            outcome = ranks.train(folder / "logs", argv(folder / "output", *KINDS[kind]))
            assert outcome.succeeded, "\n".join(outcome.outputs)
            found[kind] = runs.result_of(folder / "output")
        return found[kind]

    return of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_killed_inside_every_file_of_a_save_the_next_start_ends_in_the_same_bits(
    tmp_path, argv, uninterrupted, kind, rank
):
    expected, died = uninterrupted(kind), []
    for sign in WRITTEN:
        output = tmp_path / sign
        words = argv(output, *KINDS[kind])
        outcome = ranks.run(tmp_path / "logs", runs.train_and_die_writing, (words, rank, sign, 0.5))
        if outcome.succeeded:  # this rank writes no such file
            continue
        died.append(sign)
        assert outcome.statuses[int(rank)] == -signal.SIGKILL, "\n".join(outcome.outputs)
        assert newest_verified(output) is not None, sign
        outcome = ranks.train(tmp_path / "logs", words)
        assert outcome.succeeded, "\n".join(outcome.outputs)
        assert "resuming from" in outcome.outputs[0]
        assert runs.result_of(output) == expected, sign
        assert [one.name for one in output.glob("checkpoint-*")] == ["checkpoint-6"], sign
    assert len(died) >= (8 if rank == "0" else 2), died


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_moment_a_run_ends_in_the_same_bits(tmp_path, argv, uninterrupted, kind):
    """All ranks, one rank, again and again; a watcher sees a whole checkpoint at every instant behind the first."""
    drawn = random.Random(f"{kind} {time.strftime('%Y-%m-%d')}")
    for attempt in range(5):
        output = tmp_path / f"run-{attempt}"
        words, kills, missing = argv(output, *KINDS[kind]), 0, []
        stop = threading.Event()
        watcher = threading.Thread(target=_watch, args=(output, stop, missing))
        watcher.start()
        while True:
            moment = drawn.uniform(0.5, 6) if kills < 4 else 600
            outcome = ranks.run(tmp_path / "logs", _train_until, (words, moment, drawn.choice(["0", "1", "01"])))
            if outcome.succeeded:
                break
            kills += 1
            assert -signal.SIGKILL in outcome.statuses, "\n".join(outcome.outputs)
        stop.set()
        watcher.join()
        assert runs.result_of(output) == uninterrupted(kind), f"attempt {attempt}, {kills} kills"
        assert missing == []


def _train_until(argv: list[str], seconds: float, victims: str) -> None:
    from finetune.train import main

    if os.environ["RANK"] in victims:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    main(argv)
    os._exit(0)


def _watch(output: Path, stop: threading.Event, missing: list[str]) -> None:
    had_one = False
    while not stop.wait(0.05):
        found = [one for one in output.glob("checkpoint-*") if checkpoint.is_complete(one)]
        if had_one and not found:
            missing.append(f"{time.time()}: {sorted(one.name for one in output.iterdir())}")
        had_one = had_one or bool(found)


def test_a_full_disk_ends_the_run_with_what_is_missing_and_the_older_checkpoint_whole(tmp_path, argv, uninterrupted):
    disk = tmp_path / "disk"
    disk.mkdir()
    words = argv(disk / "output", *KINDS["zero3-full"])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(disk)], check=True)
    try:
        outcome = ranks.run(tmp_path / "logs", _fill_before_the_second_save, (words, str(disk)))
        said = outcome.outputs[0]
        assert outcome.statuses[0] == 6, said
        assert said.count("error: ") == 1 and "Traceback" not in said
        assert f"checkpoint-4 was not saved in {disk / 'output'}" in said and "MB are missing" in said
        assert "the newest checkpoint is" in said and "checkpoint-2" in said
        assert [one.name for one in (disk / "output").glob("checkpoint-*")] == ["checkpoint-2"]
        assert checkpoint.verify_checkpoint(disk / "output/checkpoint-2") == []
        (disk / "filler").unlink()
        outcome = ranks.train(tmp_path / "logs", words)
        assert outcome.succeeded, "\n".join(outcome.outputs)
        assert runs.result_of(disk / "output") == uninterrupted("zero3-full")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def _fill_before_the_second_save(argv: list[str], disk: str) -> None:
    import finetune.checkpoint.saver as saving
    from finetune.train import main

    plain = saving.Saver.begin

    def begin(self, step, run_id):
        if step == 4 and os.environ["RANK"] == "0":
            with open(f"{disk}/filler", "wb") as file:
                file.write(bytes(shutil.disk_usage(disk).free - (1 << 20)))
        return plain(self, step, run_id)

    saving.Saver.begin = begin
    main(argv)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_up_within_a_save_ends_it_on_all_ranks_and_removes_the_remains(tmp_path, argv, kind):
    disk = tmp_path / "disk"
    disk.mkdir()
    words = argv(disk / "output", *KINDS[kind])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(disk)], check=True)
    try:
        outcome = ranks.run(tmp_path / "logs", _fill_within_the_second_save, (words, str(disk)))
        said = outcome.outputs[0]
        assert outcome.statuses[0] == 6, "\n".join(outcome.outputs)
        assert len(re.findall("^error: ", said, re.MULTILINE)) == 1 and "Traceback" not in said
        assert "checkpoint-4 was not saved" in said and "what it had written was removed" in said
        assert [one.name for one in (disk / "output").glob("checkpoint-*")] == ["checkpoint-2"]
        assert checkpoint.verify_checkpoint(disk / "output/checkpoint-2") == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def _fill_within_the_second_save(argv: list[str], disk: str) -> None:
    import finetune.checkpoint.saver as saving
    from finetune.train import main

    plain = saving.Saver.begin

    def begin(self, step, run_id):
        folder = plain(self, step, run_id)
        if step == 4 and os.environ["RANK"] == "0":
            with open(f"{disk}/filler", "wb") as file:
                file.write(bytes(shutil.disk_usage(disk).free - (40 << 10)))
        return folder

    saving.Saver.begin = begin
    main(argv)


def doctored(path: Path, target: Path) -> None:
    """The archive at `path`, its pickle one that would touch `target` and then be as before."""

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {target}",)

    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    plain = entries[name]
    evil = pickle.dumps(Payload(), protocol=2)
    entries[name] = evil[:-1] + b"0" + plain[2:]  # run, drop what it returned, go on
    with zipfile.ZipFile(path, "w") as archive:
        for one, content in entries.items():
            archive.writestr(one, content)


@pytest.mark.parametrize("sealed_again", [False, True], ids=["as found", "with a manifest that fits"])
def test_a_doctored_pickle_of_each_kind_is_named_and_never_loaded(tmp_path, argv, sealed_again):
    output = tmp_path / "output"
    words = argv(output, *KINDS["zero2-lora"])
    assert ranks.train(tmp_path / "logs", words).succeeded
    touched = tmp_path / "touched"
    whole = tmp_path / "whole"
    shutil.copytree(output, whole)
    pickled = [
        name for name in checkpoint.read_manifest(whole / "checkpoint-6").files if name.endswith((".pt", ".pth"))
    ]
    assert len(pickled) == 6, pickled
    for name in pickled:
        shutil.rmtree(output)
        shutil.copytree(whole, output)
        doctored(output / "checkpoint-6" / name, touched)
        if sealed_again:
            _seal_again(output / "checkpoint-6", name)
        outcome = ranks.train(tmp_path / "logs", words)
        assert outcome.statuses[0] == 4, "\n".join(outcome.outputs)
        said = outcome.outputs[0]
        assert f"checkpoint-6/{name} names " in said and "system" in said
        assert not touched.exists()
    shutil.rmtree(output)
    shutil.copytree(whole, output)
    with zipfile.ZipFile(output / "checkpoint-6/training_args.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    doctored(output / "checkpoint-6/training_args.bin", touched)
    outcome = ranks.train(tmp_path / "logs", words)
    assert outcome.statuses[0] == 4 and "training_args.bin is not in manifest.json" in outcome.outputs[0]
    assert not touched.exists()


def _seal_again(folder: Path, name: str) -> None:
    manifest = checkpoint.read_manifest(folder)
    files = {**manifest.files, **checkpoint.fsync_and_hash(folder, [name], 0)}
    checkpoint.write_manifest(folder, replace(manifest, files=files))
