"""Two ranks that share each conversation learn what one rank learns from it whole."""

import pytest

from tests.helpers import ranks
from tests.helpers.batch_runs import LORA, assert_same, shape
from tests.helpers.tiers import mostly_slow

SHARED = ("--sequence_parallel_size", "2")


@pytest.mark.parametrize(
    ("config", "more"),
    [
        pytest.param("zero1", (), marks=pytest.mark.slow),
        pytest.param("zero2", LORA, marks=pytest.mark.slow),
        pytest.param("zero3", (), marks=pytest.mark.slow),
        ("zero3", (*LORA, "--gradient_checkpointing", "True")),
        pytest.param("zero2", ("--loss_weighting", "conversation"), marks=pytest.mark.slow),
    ],
    ids=["zero1-full", "zero2-lora", "zero3-full", "zero3-lora-checkpointed", "conversations"],
)
def test_shared_rows_give_the_losses_gradients_and_weights_of_whole_ones(train_shaped, config, more):
    alone = train_shaped("alone", 1, *shape(4, 2, "zero2"), *more)
    assert_same(alone, train_shaped("shared", 2, *shape(4, 2, config), *more, *SHARED), steps=4)


@pytest.mark.slow
def test_packed_rows_and_token_budgets_are_shared_too(train_shaped, tmp_path):
    budget = ("--deepspeed", "zero2", "--tokens_per_device_batch", "300", "--gradient_accumulation_steps", "2")
    assert_same(train_shaped("alone", 1, *budget), train_shaped("shared", 2, *budget, *SHARED), steps=4)
    assert "2 (CPU, gloo), 2 share each conversation" in (tmp_path / "shared-logs/rank-0.log").read_text()


REFUSED = {
    "four ranks": (2, 4, "it does not divide the 2 ranks"),
    "no DeepSpeed": (2, 2, "it needs DeepSpeed"),
    "padded": (2, 2, "ranks can only share flat or packed rows: leave out --batching padded"),
    "eager": (2, 2, "--attn_implementation eager"),
}
MORE = {"padded": ("--batching", "padded"), "eager": ("--attn_implementation", "eager")}


@pytest.mark.parametrize("name", mostly_slow(REFUSED, ["four ranks", "padded"]))
def test_what_cannot_be_shared_is_refused(tmp_path, tiny_model, conversation_file, name):
    status, size, message = REFUSED[name]
    argv = ["--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", tmp_path / "out"]
    deepspeed = () if name == "no DeepSpeed" else ("--deepspeed", "zero2")
    flags = ("--sequence_parallel_size", size, "--use_cpu", "True", *deepspeed, *MORE.get(name, ()))
    outcome = ranks.train(tmp_path / "logs", [*argv, *flags])
    assert outcome.statuses[0] == status
    assert message in outcome.outputs[0] and "Traceback" not in outcome.outputs[0]


def test_heads_must_divide(tmp_path, tiny_model, conversation_file):
    outcome = ranks.train(
        tmp_path / "logs",
        [
            *("--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", tmp_path / "out"),
            *("--sequence_parallel_size", "3", "--deepspeed", "zero2"),
        ],
        world_size=3,
    )
    assert outcome.statuses[0] == 2
    assert "it does not divide the model's 4 attention heads" in outcome.outputs[0]
