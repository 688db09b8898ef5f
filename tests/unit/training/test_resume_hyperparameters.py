"""A resumed run trains with the hyperparameters that it asks for, at its step of its own schedule."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from finetune.config.arguments import training_flags
from finetune.config.flag_support import REFUSED, WITHOUT_EFFECT
from finetune.training.hyperparameters import Hyperparameters, innermost
from finetune.training.resume_check import FREE, NEVER, compare_with_checkpoint
from finetune.utils.errors import CheckpointError

STEPS_BEFORE, EPOCH_STEPS = 3, 5
OLD = {
    "learning_rate": 1e-2, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0, "lr_scheduler_type": "cosine", "warmup_steps": 2, "num_train_epochs": 2, "max_steps": -1,
    "lr_scheduler_kwargs": None,
}  # fmt: skip
CHANGES = [
    {"learning_rate": 1e-4},
    {"weight_decay": 0.7},
    {"weight_decay": 0.0},
    {"adam_beta1": 0.5},
    {"adam_beta2": 0.6},
    {"adam_epsilon": 1e-1},
    {"max_grad_norm": 1e-3},
    {"lr_scheduler_type": "linear"},
    {"lr_scheduler_type": "constant", "warmup_steps": 0},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.5}},
    {"warmup_steps": 6},
    {"num_train_epochs": 9},
    {"max_steps": 30},
    {"learning_rate": 3e-3, "weight_decay": 0.4, "adam_beta1": 0.8, "lr_scheduler_type": "linear", "max_steps": 12},
    {},
]


def schedule_factor(flags: dict, step: int) -> float:
    """Formulas of transformers' documentation, written again."""
    total = flags["max_steps"] if flags["max_steps"] > 0 else EPOCH_STEPS * flags["num_train_epochs"]
    kind, warmup = flags["lr_scheduler_type"], flags["warmup_steps"]
    if kind == "constant":
        return 1.0
    if step < warmup:
        return step / warmup
    share = (step - warmup) / (total - warmup)
    if kind == "linear":
        return 1 - share
    cosine = 0.5 * (1 + math.cos(math.pi * share))
    if kind == "cosine_with_min_lr":
        least = flags["lr_scheduler_kwargs"]["min_lr_rate"]
        return least + (1 - least) * cosine
    return cosine


def built(flags: dict) -> tuple[torch.nn.Module, SimpleNamespace, object]:
    """Model, optimizer in a wrapper as accelerate's, and schedule, made by the functions that the Trainer uses."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 2))
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, report_to="none", **flags)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    decays = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": decays, "weight_decay": arguments.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = SimpleNamespace(optimizer=kind(groups, **options))
    total = arguments.max_steps if arguments.max_steps > 0 else EPOCH_STEPS * int(arguments.num_train_epochs)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type, optimizer.optimizer, arguments.get_warmup_steps(total), total,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )  # fmt: skip
    return model, optimizer, scheduler


def give_gradients(model: torch.nn.Module, step: int, norm: float) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    torch.nn.utils.clip_grad_norm_(model.parameters(), norm)


def resumed(flags: dict, *, applies: bool = True) -> tuple[torch.nn.Module, SimpleNamespace, object]:
    """Three steps with OLD, then a load into what `flags` build, as the Trainer does it."""
    model, optimizer, scheduler = built(OLD)
    for step in range(STEPS_BEFORE):
        give_gradients(model, step, OLD["max_grad_norm"])
        optimizer.optimizer.step()
        scheduler.step()
    states = json.dumps(scheduler.state_dict()), optimizer.optimizer.state_dict(), model.state_dict()
    model, optimizer, scheduler = built(flags)
    wanted = Hyperparameters.read(optimizer, scheduler)
    scheduler.load_state_dict(json.loads(states[0]))
    optimizer.optimizer.load_state_dict(states[1])
    model.load_state_dict(states[2])
    if applies:
        wanted.apply(optimizer, scheduler)
    return model, optimizer, scheduler


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: "-".join(change) or "nothing")
def test_the_first_resumed_step_is_that_of_the_flags(change):
    flags = {**OLD, **change}
    model, optimizer, scheduler = resumed(flags)
    rate = flags["learning_rate"] * schedule_factor(flags, STEPS_BEFORE)
    assert scheduler.get_last_lr() == pytest.approx([rate, rate], rel=1e-12)
    give_gradients(model, STEPS_BEFORE, flags["max_grad_norm"])
    expected = [adamw(optimizer.optimizer, parameter, flags, rate) for parameter in model.parameters()]
    optimizer.optimizer.step()
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-8)
    scheduler.step()
    rate = flags["learning_rate"] * schedule_factor(flags, STEPS_BEFORE + 1)
    assert scheduler.get_last_lr() == pytest.approx([rate, rate], rel=1e-12)


def adamw(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, flags: dict, rate: float) -> torch.Tensor:
    """One step of AdamW (Loshchilov and Hutter 2019, algorithm 2), in float64, from states of earlier steps."""
    state, gradient = optimizer.state[parameter], parameter.grad.double()
    step, decay = float(state["step"]) + 1, flags["weight_decay"] if parameter.ndim > 1 else 0.0
    first, second = flags["adam_beta1"], flags["adam_beta2"]
    mean = first * state["exp_avg"].double() + (1 - first) * gradient
    square = second * state["exp_avg_sq"].double() + (1 - second) * gradient**2
    update = (mean / (1 - first**step)) / ((square / (1 - second**step)).sqrt() + flags["adam_epsilon"])
    return parameter.detach().double() * (1 - rate * decay) - rate * update


def test_without_it_the_checkpoint_decides():
    """Or the test above would prove nothing."""
    _, optimizer, scheduler = resumed({**OLD, "learning_rate": 1e-4, "weight_decay": 0.7}, applies=False)
    rate = OLD["learning_rate"] * schedule_factor(OLD, STEPS_BEFORE)
    assert optimizer.optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    assert optimizer.optimizer.param_groups[0]["weight_decay"] == OLD["weight_decay"]


def test_counters_in_the_groups_of_an_optimizer_stay_those_of_the_checkpoint():
    class Counting(torch.optim.SGD):
        """As schedule-free optimizers do, with a count among the defaults that is no argument."""

        def __init__(self, params, lr=0.1, momentum=0.0):
            super().__init__(params, lr=lr, momentum=momentum)
            for group in self.param_groups:
                group["k"] = 0
            self.defaults["k"] = 0

        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                group["k"] += 1

    weight = torch.ones(2, requires_grad=True)
    old, new = Counting([weight], momentum=0.9), Counting([weight], momentum=0.5)
    weight.grad = torch.ones(2)
    old.step()
    schedules = [get_scheduler("constant", each) for each in (old, new)]
    wanted = Hyperparameters.read(new, schedules[1])
    new.load_state_dict(old.state_dict())
    wanted.apply(new, schedules[1])
    assert (new.param_groups[0]["k"], new.param_groups[0]["momentum"]) == (1, 0.5)


def test_deepspeed_clips_and_scales_as_its_new_config_says():
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    def engine_optimizer(clip: float, window: int) -> SimpleNamespace:
        scaler = DynamicLossScaler(2**16, window, 1, 2, False, dtype=torch.half)
        inner = torch.optim.AdamW([torch.ones(1, requires_grad=True)], lr=1e-3)
        zero = SimpleNamespace(optimizer=inner, clip_grad=clip, loss_scaler=scaler, dynamic_loss_scale=True)
        return SimpleNamespace(optimizer=zero)

    old, new = engine_optimizer(1.0, 1000), engine_optimizer(0.25, 7)
    schedules = [get_scheduler("constant", innermost(each)) for each in (old, new)]
    old.optimizer.loss_scaler.cur_scale, old.optimizer.loss_scaler.cur_iter = 64.0, 5
    wanted = Hyperparameters.read(new, schedules[1])
    new.optimizer.clip_grad, new.optimizer.loss_scaler = old.optimizer.clip_grad, old.optimizer.loss_scaler
    innermost(new).load_state_dict(innermost(old).state_dict())
    wanted.apply(new, SimpleNamespace(scheduler=schedules[1]))
    scaler = new.optimizer.loss_scaler
    assert (new.optimizer.clip_grad, scaler.scale_window, scaler.cur_scale, scaler.cur_iter) == (0.25, 7, 64.0, 5)


# ---- which differences a run may resume over

IN_OPTIMIZER_OR_SCHEDULE = {name for change in CHANGES for name in change} | {"warmup_ratio"}
READ_AFRESH = {
    # what batches, loss, precision and libraries do, which no checkpoint stores
    "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "label_smoothing_factor",
    "train_sampling_strategy", "dataloader_drop_last", "neftune_noise_alpha", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "liger_kernel_config", "full_determinism",
    "use_cache",
}  # fmt: skip


def test_every_flag_of_transformers_that_changes_numbers_is_applied_refused_or_read_afresh():
    compared = set(training_flags()) - FREE - set(REFUSED) - set(WITHOUT_EFFECT)
    assert compared - IN_OPTIMIZER_OR_SCHEDULE - READ_AFRESH == {name[2:] for name in NEVER if name[2:] in compared}


@pytest.fixture
def compare(tmp_path: Path):
    def run(old: dict, new: dict, **options) -> list[str]:
        facts = {"--lr_scheduler_type": "cosine", "--optim": "adamw_torch", "ZeRO stage": 2}
        manifest = SimpleNamespace(facts={**facts, **old}, is_resumable=True, world_size=1, step_rows=2)
        batch = SimpleNamespace(world_size=1, step_rows=2)
        config = SimpleNamespace(any_world_size=False, allow_inexact=True, **options)
        return compare_with_checkpoint({**facts, **new}, batch, config, tmp_path, manifest)

    return run


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ({"--optim": "adamw_torch"}, {"--optim": "sgd"}, "--optim: adamw_torch, now sgd"),
        ({"--optim": "adamw_bnb_8bit"}, {"--optim": "adamw_torch"}, "--optim: adamw_bnb_8bit"),
        ({"optimizer": {"type": "AdamW"}}, {"optimizer": {"type": "Lion"}}, "optimizer: "),
        ({"optimizer": "of the command line"}, {"optimizer": {"type": "AdamW"}}, "optimizer: of the command line"),
        ({"--lr_scheduler_type": "cosine"}, {"--lr_scheduler_type": "greedy"}, "now greedy"),
        (
            {"--lr_scheduler_type": "reduce_lr_on_plateau", "--learning_rate": 1.0},
            {"--lr_scheduler_type": "reduce_lr_on_plateau", "--learning_rate": 2.0},
            "--learning_rate: 1.0, now 2.0",
        ),
        ({"--lora_r": 8}, {"--lora_r": 4}, "--lora_r: 8, now 4"),
        ({"--init_lora_weights": "pissa_niter_4"}, {}, "--init_lora_weights: pissa_niter_4, now default"),
    ],
)
def test_what_no_state_fits_is_refused_whatever_is_allowed(compare, old, new, named):
    with pytest.raises(CheckpointError, match="cannot resume from it") as caught:
        compare(old, new)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"--optim": "adamw_torch"}, {"--optim": "adamw_torch_fused"}),
        ({"--learning_rate": 1.0}, {"--learning_rate": 2.0}),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, {"optimizer": {"type": "AdamW", "params": {"lr": 2}}}),
        ({"--lr_scheduler_type": "cosine"}, {"--lr_scheduler_type": "linear"}),
        ({"--init_lora_weights": "default"}, {"--init_lora_weights": "gaussian"}),
    ],
)
def test_what_is_applied_afresh_may_change_where_the_user_allows_it(compare, old, new):
    (line,) = compare(old, new)
    assert line.startswith(next(iter(new)))


def test_a_manifest_without_the_newer_facts_differs_in_nothing(compare):
    assert compare({}, {"loss scaling": {"loss_scale": 0}}) == []
