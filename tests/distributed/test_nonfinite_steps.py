"""Steps that are not finite, slow ranks, requests to stop, on real ranks."""

import json
import signal
from pathlib import Path

import pytest

from finetune import checkpoint
from finetune.dataset import skip_rows
from finetune.training import nonfinite
from tests.helpers import ranks, runs
from tests.helpers.rows import write_rows

FAULTS = pytest.mark.faults


# Twelve rows of like length, in order, two a step: step s learns rows 2s-2 and 2s-1, one on each rank.
WORDS = "apple bread chair dance eagle flame grape house ivory jelly knife lemon".split()


ROWS = [[("human", "Say it."), ("model", f"It is {word}.")] for word in WORDS]


FLAGS = (
    "--num_train_epochs 1 --learning_rate 1e-3 --lr_scheduler_type constant --logging_steps 1 --use_cpu True "
    "--save_strategy steps --save_steps 1 --save_total_limit 0 --per_device_train_batch_size 1 "
    "--train_sampling_strategy sequential --write_report False"
).split()


LORA = ("--use_lora", "True")


CONFIGS = {
    "zero1": ("--deepspeed", "zero1"),
    "zero2": ("--deepspeed", "zero2"),
    "zero3": ("--deepspeed", "zero3"),
    "zero2-lora": ("--deepspeed", "zero2", *LORA),
    "zero3-lora": ("--deepspeed", "zero3", *LORA),
    "plain": (),
    "plain-lora": LORA,
}


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.json", ROWS)


@pytest.fixture
def ids_of(smol_tokenizer):
    """Token ids that only these rows learn."""

    def found(*chosen: int) -> list[int]:
        ids = {row: set(smol_tokenizer.encode(f"It is {word}.")) for row, word in enumerate(WORDS)}
        others = set().union(*(ids[row] for row in ids if row not in chosen))
        mine = [ids[row] - others for row in chosen]
        assert all(mine)
        return sorted(set().union(*mine))

    return found


@pytest.fixture
def start(tmp_path, tiny_model, rows_file):
    """Start into tmp_path/NAME; the ranks call `function(argv, *more)`."""

    def run(name: str, flags, function=runs.train_losing, more=(), world_size: int = 2) -> ranks.Outcome:
        named = ["--model_name_or_path", tiny_model, "--data_path", rows_file, "--output_dir", tmp_path / name]
        argv = [*map(str, [*named, *FLAGS, *flags])]
        return ranks.run(tmp_path / f"{name}-logs", function, (argv, *more), world_size)

    return run


@pytest.fixture
def lose(start, tmp_path):
    """Train where the loss of some token ids is lost."""

    def run(name: str, *flags, how: str = "nan", ids=None, rank: int | None = None, world_size: int = 2):
        return start(name, flags, more=(str(tmp_path / f"{name}-rows"), how, ids, rank), world_size=world_size)

    return run


def check_one_lost_step(outcome: ranks.Outcome, output: Path, how: str) -> None:
    """Row 5, in step 3 of 6."""
    assert outcome.succeeded, "\n".join(outcome.outputs)
    metrics = runs.lines_of(output / "metrics.jsonl")
    assert [line["non_finite_steps"] for line in metrics] == [0, 0, 1, 1, 1, 1]
    lost = {"gradient": ["grad_norm"], "value": ["loss"]}.get(how, ["loss", "grad_norm"])
    for line in metrics:
        wrong = lost if line["step"] == 3 else []
        assert [name for name in ("loss", "grad_norm") if line[name] is None] == wrong, line
        assert line["loss"] is None or 5 < line["loss"] < 15
    runs.assert_finite(output)
    assert runs.steps_saved(output) == [1, 2, 4, 5, 6]  # a run that ends for the third step begins again in front of it
    records = runs.lines_of(output / "non_finite_rows.jsonl")
    assert {one["row"] for one in records} == ({4, 5} if how == "gradient" else {5})
    (record,) = [one for one in records if one["row"] == 5]
    assert record["step"] == 3 and record["id"] == 5 and "It is flame." in record["text"]
    assert record["found"] == {"gradient": None, "value": "nan"}.get(how, how)
    assert (record["loss"] is None) == (how != "gradient")
    said = outcome.outputs[0]
    assert said.count("note: step 3: ") == 1 and f"{record['source']}:5" in said
    assert ("was applied" in said) == (how == "value")
    assert lines_of_state(output) == []


def lines_of_state(output: Path) -> list[str]:
    """Literals in trainer_state.json that standard JSON does not have."""
    found: list[str] = []
    json.loads((output / "trainer_state.json").read_text(), parse_constant=found.append)
    return found


@pytest.mark.parametrize(
    ("config", "how"),
    [
        ("zero2", "nan"),
        *(
            pytest.param(config, how, marks=FAULTS)
            for config, how in [
                *((config, "nan") for config in CONFIGS if config != "zero2"),
                ("zero2", "inf"), ("zero3", "inf"), ("plain", "inf"),
                ("zero1", "gradient"), ("zero2", "gradient"), ("zero3-lora", "gradient"), ("plain", "gradient"),
                ("zero2", "value"), ("zero3", "value"), ("plain", "value"),
            ]
        ),
    ],
)  # fmt: skip
def test_one_step_that_is_not_finite_is_shown_and_left_out(lose, tmp_path, ids_of, config, how):
    outcome = lose("run", *CONFIGS[config], how=how, ids=ids_of(5))
    check_one_lost_step(outcome, tmp_path / "run", how)


@FAULTS
def test_deepspeed_without_zero_leaves_the_step_out_too(lose, tmp_path, ids_of):
    (tmp_path / "zero0.json").write_text('{"zero_optimization": {"stage": 0}}')
    outcome = lose("run", "--deepspeed", tmp_path / "zero0.json", ids=ids_of(5))
    assert outcome.succeeded, "\n".join(outcome.outputs)
    assert [line["loss"] is None for line in runs.lines_of(tmp_path / "run/metrics.jsonl")] == [
        False,
        False,
        True,
    ] + 3 * [False]
    assert_finite_models(tmp_path / "run")


def assert_finite_models(output: Path) -> None:
    from safetensors.torch import load_file

    paths = list(output.rglob("*.safetensors"))
    assert len(paths) > 1
    for path in paths:
        assert all(bool(one.isfinite().all()) for one in load_file(path).values()), path


@FAULTS
def test_a_step_that_is_left_out_leaves_the_weights_and_the_optimizer_alone(lose, tmp_path, ids_of):
    """Whatever the third step learns: plain torch and DeepSpeed go on from the second."""
    losses = {}
    for config in ("plain", "zero2"):
        lose(config, *CONFIGS[config], ids=ids_of(4, 5))
        losses[config] = [line["loss"] for line in runs.lines_of(tmp_path / config / "metrics.jsonl")]
    assert losses["plain"][2] is losses["zero2"][2] is None
    finite = [[loss for loss in one if loss is not None] for one in losses.values()]
    assert finite[0] == pytest.approx(finite[1], abs=1e-4) and len(finite[0]) == 5


@FAULTS
def test_a_line_over_several_steps_is_the_mean_of_those_with_a_loss(lose, tmp_path, ids_of):
    every = lose("every", "--deepspeed", "zero2", ids=ids_of(5))
    some = lose("some", "--deepspeed", "zero2", "--logging_steps", "3", ids=ids_of(5))
    assert every.succeeded and some.succeeded
    one = [line["loss"] for line in runs.lines_of(tmp_path / "every/metrics.jsonl")]
    three = [line["loss"] for line in runs.lines_of(tmp_path / "some/metrics.jsonl")]
    assert three == pytest.approx([(one[0] + one[1]) / 2, sum(one[3:]) / 3], abs=1e-5)
    going_on = ("--logging_steps", "3", "--resume_from_checkpoint", tmp_path / "some/checkpoint-4")
    resumed = lose("on", "--deepspeed", "zero2", *going_on, ids=ids_of(5))
    assert resumed.succeeded, resumed.outputs[0]
    assert runs.lines_of(tmp_path / "on/metrics.jsonl")[0]["non_finite_steps"] == 1
    assert [line["loss"] for line in runs.lines_of(tmp_path / "on/metrics.jsonl")] == three[1:]


def check_ended(outcome: ranks.Outcome, output: Path, *, step: int, rows: list[int], newest: int | None) -> None:
    assert outcome.statuses[0] == 5, "\n".join(outcome.outputs)
    said = "".join(outcome.outputs)
    assert said.count("error: ") == 1 and f"error: step {step}: " in said and "Traceback" not in said
    assert (
        "--skip_rows" in said
        and "--resume_from_checkpoint auto" in said
        and str(output / nonfinite.NONFINITE_ROWS_FILE) in said
    )
    assert (f"checkpoint-{newest}" if newest else "there is no checkpoint yet") in said
    records = runs.lines_of(output / nonfinite.NONFINITE_ROWS_FILE)
    assert sorted({one["row"] for one in records}) == rows
    assert all(f"{one['source']}:{one['row']}" in said for one in records)
    assert runs.steps_saved(output) == list(range(1, (newest or 0) + 1))
    assert runs.lines_of(output / "metrics.jsonl")[-1]["step"] == step
    if newest:
        runs.assert_finite(output)


def rows_seen(tmp_path: Path, name: str, world_size: int = 2) -> dict[int, list[int]]:
    """Examples of each step, counted from 1."""
    found: dict[int, list[int]] = {}
    for rank in range(world_size):
        for _, step, _, rows in runs.lines_of(tmp_path / f"{name}-rows-{rank}.jsonl"):
            found.setdefault(step + 1, []).extend(rows)
    return {step: sorted(rows) for step, rows in found.items()}


@FAULTS
@pytest.mark.parametrize("config", ["zero2", "zero3", "zero3-lora", "plain", "plain-lora"])
def test_three_in_a_row_end_the_run_and_without_their_rows_it_goes_on(lose, tmp_path, ids_of, config):
    flags, ids, output = CONFIGS[config], ids_of(4, 7, 8), tmp_path / "run"
    check_ended(lose("run", *flags, ids=ids), output, step=5, rows=[4, 7, 8], newest=2)
    for rank in range(2):
        (tmp_path / f"run-rows-{rank}.jsonl").unlink()

    again = lose(
        "run",
        *flags,
        "--skip_rows",
        output / nonfinite.NONFINITE_ROWS_FILE,
        "--resume_from_checkpoint",
        "auto",
        ids=ids,
    )

    assert again.succeeded, "\n".join(again.outputs)
    assert rows_seen(tmp_path, "run") == {3: [5], 4: [6], 5: [9], 6: [10, 11]}
    metrics = runs.lines_of(output / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6] and metrics[-1]["non_finite_steps"] == 0
    assert all(5 < line["loss"] < 15 for line in metrics)
    left_out = [line for line in runs.lines_of(output / "data_ledger.jsonl") if line["reason"] == skip_rows.REASON]
    assert [(line["row"], line["id"]) for line in left_out] == [(4, 4), (7, 7), (8, 8)]
    run = json.loads((output / "run.json").read_text())
    assert [one.rpartition(":")[2] for one in run["data"]["left_out"]] == ["4", "7", "8"] and run["completed"]
    assert "rows left out by --skip_rows: 0, now 3" in run["resumed"][0]["changes"]
    assert "3 rows are skipped from now on" in again.outputs[0]
    runs.assert_finite(output)

    back = lose("run", *flags, "--resume_from_checkpoint", output / "checkpoint-4", ids=ids)
    assert back.statuses[0] == 4 and "rows left out by --skip_rows" in back.outputs[0]


@FAULTS
def test_a_step_of_which_nothing_is_left_has_no_loss(lose, tmp_path, rows_file):
    (tmp_path / "skip").write_text(f"{rows_file}:4\n{rows_file}:5\n{rows_file}:6\n")
    outcome = lose("run", "--deepspeed", "zero3", "--skip_rows", tmp_path / "skip", ids=[])
    assert outcome.succeeded, "\n".join(outcome.outputs)
    metrics = runs.lines_of(tmp_path / "run/metrics.jsonl")
    assert [line["loss"] is None for line in metrics] == [False, False, True, False, False, False]
    assert {line["non_finite_steps"] for line in metrics} == {0} and metrics[2]["grad_norm"] == 0
    assert rows_seen(tmp_path, "run") == {1: [0, 1], 2: [2, 3], 3: [], 4: [7], 5: [8, 9], 6: [10, 11]}

    (tmp_path / "skip").write_text("\n".join(f"{rows_file}:{row}" for row in range(12)))
    outcome = lose("none", "--deepspeed", "zero2", "--skip_rows", tmp_path / "skip", ids=[])
    assert outcome.statuses[0] == 2 and "leaves out every row" in outcome.outputs[0]


@FAULTS
@pytest.mark.parametrize("config", ["zero2", "zero3", "plain", "zero3-lora"])
@pytest.mark.parametrize(("how", "rank"), [("nan", None), ("inf", None), ("nan", 1), ("gradient", 1)])
def test_numbers_that_are_never_finite_end_the_run_before_anything_is_saved(lose, tmp_path, config, how, rank):
    outcome = lose("run", *CONFIGS[config], how=how, rank=rank)
    assert outcome.statuses[0] == 5
    records = runs.lines_of(tmp_path / "run" / nonfinite.NONFINITE_ROWS_FILE)
    assert {one["step"] for one in records} == {1, 2, 3}
    everyone = rank is None or how == "gradient"
    assert {one["rank"] for one in records} == ({0, 1} if everyone else {rank})
    assert len(records) == (6 if everyone else 3)
    assert ("on rank 1 loss is nan" in outcome.outputs[0]) == (rank == 1 and how == "nan")
    rows = sorted(one["row"] for one in records if one["step"] <= 3)
    last = [one for one in records if one["step"] == 3]
    assert f"{last[0]['source']}:{last[0]['row']}" in outcome.outputs[0] and len(rows) == len(records)
    assert runs.steps_saved(tmp_path / "run") == [] and "there is no checkpoint yet" in outcome.outputs[0]


@FAULTS
def test_a_run_without_one_finite_step_does_not_report_success(lose, tmp_path):
    outcome = lose("run", "--deepspeed", "zero2", "--max_steps", "2")
    assert outcome.statuses[0] == 5 and "no step of the run was finite" in outcome.outputs[0]


@FAULTS
def test_three_steps_apart_end_a_short_run_and_the_count_survives_a_resume(lose, tmp_path, ids_of):
    outcome = lose("run", "--deepspeed", "zero2", "--num_train_epochs", "3", ids=ids_of(5))
    assert outcome.statuses[0] == 5 and "3 of 15 steps were not finite" in outcome.outputs[0]
    assert runs.steps_saved(tmp_path / "run")[-1] == 14
    again = lose(
        "run", "--deepspeed", "zero2", "--num_train_epochs", "3", "--resume_from_checkpoint", "auto", ids=ids_of(5)
    )
    assert again.statuses[0] == 5 and "3 of 15 steps were not finite" in again.outputs[0]


@FAULTS
@pytest.mark.parametrize("config", ["zero2", "zero3", "plain"])
def test_weights_that_are_not_finite_are_never_saved(start, tmp_path, config):
    """An update so large that the weights overflow, from numbers that are finite."""
    outcome = start("run", [*CONFIGS[config], "--save_steps", "1"], _train_with_a_broken_weight, ())
    assert outcome.statuses[0] == 5, "\n".join(outcome.outputs)
    assert "is not saved: the weights of" in outcome.outputs[0] and "Traceback" not in outcome.outputs[0]
    assert runs.steps_saved(tmp_path / "run") == [1]
    runs.assert_finite(tmp_path / "run")


def _train_with_a_broken_weight(argv: list[str]) -> None:
    import torch

    from finetune.train import main
    from finetune.training.trainer import SupervisedTrainer

    plain = SupervisedTrainer.on_step_end

    def breaking(self, *event, **more):
        plain(self, *event, **more)
        if self.state.global_step == 2 and self.args.process_index == self.args.world_size - 1:
            for parameter in self.model.parameters():
                with torch.no_grad():
                    getattr(parameter, "ds_tensor", parameter).data.view(-1)[0] = float("inf")

    SupervisedTrainer.on_step_end = breaking
    main(argv)


@FAULTS
@pytest.mark.parametrize(
    ("number", "rank", "config"),
    [(signal.SIGTERM, 1, "zero2"), (signal.SIGUSR1, 1, "zero3"), (signal.SIGTERM, 0, "plain"),
     (signal.SIGINT, 1, "zero3-lora")],
)  # fmt: skip
def test_a_signal_to_one_rank_stops_all_after_the_same_step_saved(start, tmp_path, number, rank, config):
    flags = [*CONFIGS[config], "--save_strategy", "no", "--dataloader_num_workers", "1"]
    outcome = start("run", flags, runs.train_asked_to_stop, (rank, 3, int(number)))
    assert outcome.succeeded, "\n".join(outcome.outputs)
    for said in outcome.outputs:
        assert f"stopped by {signal.Signals(number).name} on rank {rank} at 3" in said
    assert (
        runs.steps_saved(tmp_path / "run") == [3] and checkpoint.verify_checkpoint(tmp_path / "run/checkpoint-3") == []
    )
    whole = start("whole", flags, runs.train_noting_rows, (str(tmp_path / "whole-rows"),))
    again = start(
        "run", [*flags, "--resume_from_checkpoint", "auto"], runs.train_noting_rows, (str(tmp_path / "rows"),)
    )
    assert whole.succeeded and again.succeeded, "\n".join(again.outputs)
    assert runs.result_of(tmp_path / "run") == runs.result_of(tmp_path / "whole")


@FAULTS
def test_a_request_in_the_last_step_lets_the_run_complete(start, tmp_path):
    flags = ["--deepspeed", "zero2", "--save_strategy", "no"]
    outcome = start("run", flags, runs.train_asked_to_stop, (1, 6, int(signal.SIGTERM)))
    assert outcome.succeeded and all("stopped by None at 6" in said for said in outcome.outputs)
    assert runs.steps_saved(tmp_path / "run") == []


@FAULTS
def test_a_stop_at_an_epochs_end_is_saved_once(start, tmp_path):
    flags = ["--deepspeed", "zero2", "--save_strategy", "epoch", "--num_train_epochs", "2"]
    outcome = start("run", flags, runs.train_asked_to_stop, (0, 6, int(signal.SIGTERM)))
    assert outcome.succeeded and all("on rank 0 at 6" in said for said in outcome.outputs)
    assert [one.name for one in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]


@FAULTS
@pytest.mark.parametrize(
    ("config", "where", "rank"),
    [("zero1", "forward", 1), ("zero2", "forward", 1), ("zero3", "data", 1), ("zero2", "data", 0),
     ("plain", "data", 1)],
)  # fmt: skip
def test_a_slow_rank_is_named_within_twenty_steps(start, tmp_path, config, where, rank):
    flags = [*CONFIGS[config], "--num_train_epochs", "4", "--save_strategy", "no"]
    seconds = 0.5 if where == "data" else 0.2  # batches are loaded while a step runs: a part of the time is hidden
    outcome = start("run", flags, runs.train_slowly, (rank, seconds, where))
    assert outcome.succeeded, "\n".join(outcome.outputs)
    before, named, after = outcome.outputs[0].partition(f"note: rank {rank} on ")
    assert named and "step 20/24" not in before and "is slow" not in before + after.partition("\n")[2]
    assert where == "data" or f"{seconds:.1f}" in after.partition("\n")[0]


@FAULTS
def test_ranks_alike_are_not_named(start, tmp_path):
    flags = ["--deepspeed", "zero2", "--num_train_epochs", "4", "--save_strategy", "no"]
    outcome = start("run", flags, runs.train_noting_rows, (str(tmp_path / "rows"),))
    assert outcome.succeeded and "is slow" not in outcome.outputs[0]
