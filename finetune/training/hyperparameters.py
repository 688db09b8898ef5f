"""Give a resumed run the hyperparameters that it asks for.

A checkpoint holds the learning rate, weight decay, betas, gradient clipping and loss scaling of the run that wrote it,
and loading restores them: torch keeps them in optimizer groups, DeepSpeed also in its optimizer and loss scaler. They
are read here before the checkpoint is loaded, while they are those of the command line, and set again afterwards.
States (moments, step counters, the current loss scale, the place in the schedule) stay those of the checkpoint.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

# Attributes of DeepSpeed's loss scalers that its config sets; the others are their state. (DeepSpeed 0.19.8)
SCALER_SETTINGS = (
    "scale_factor", "scale_window", "min_scale", "min_loss_scale", "delayed_shift", "consecutive_hysteresis",
    "raise_error_at_min_scale",
)  # fmt: skip


@dataclass(frozen=True)
class Hyperparameters:
    """What optimizer, schedule and loss scaler were built with."""

    groups: list[dict[str, Any]]  # options of each parameter group, its current learning rate excepted
    base_rates: list[Any] | None  # learning rates that the schedule multiplies; None for schedules that do not
    clip_grad: float | None  # gradient norm at which DeepSpeed clips; None without DeepSpeed
    scaler: Any  # loss scaler of DeepSpeed as built; None without

    @classmethod
    def read(cls, optimizer: Any, scheduler: Any) -> Hyperparameters:
        """Read them of what accelerate and DeepSpeed may wrap, before a checkpoint is loaded."""
        inner, states = innermost(optimizer), _states_in_groups(innermost(optimizer))
        schedule = _unwrapped(scheduler)
        engine_optimizer = getattr(optimizer, "optimizer", optimizer)
        return cls(
            groups=[
                {name: copy.copy(value) for name, value in group.items() if name not in states}
                for group in inner.param_groups
            ],
            base_rates=list(schedule.base_lrs) if isinstance(schedule, LambdaLR) else None,
            clip_grad=getattr(engine_optimizer, "clip_grad", None),
            scaler=copy.copy(_scaler(engine_optimizer)),
        )

    def apply(self, optimizer: Any, scheduler: Any) -> None:
        """Set them after a checkpoint is loaded, with the learning rate of its step in this run's schedule."""
        for group, settings in zip(innermost(optimizer).param_groups, self.groups, strict=True):
            group.update(settings)
        engine_optimizer = getattr(optimizer, "optimizer", optimizer)
        if self.clip_grad is not None:
            engine_optimizer.clip_grad = self.clip_grad
        self._apply_to_scaler(engine_optimizer)
        self._apply_to_schedule(_unwrapped(scheduler))

    def _apply_to_schedule(self, schedule: Any) -> None:
        if self.base_rates is not None:
            schedule.base_lrs = list(self.base_rates)
            rates = [
                base * factor(schedule.last_epoch)
                for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            ]
            for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
                if torch.is_tensor(group["lr"]):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            schedule._last_lr = rates

    def _apply_to_scaler(self, engine_optimizer: Any) -> None:
        if self.scaler is None:
            return
        loaded = _scaler(engine_optimizer)
        dynamic = [bool(getattr(each, "dynamic", getattr(each, "dynamic_loss_scale", False)))
                   for each in (self.scaler, loaded)]  # fmt: skip
        if dynamic != [True, True]:  # a static scale, or the first steps of a dynamic one
            _set_scaler(engine_optimizer, copy.copy(self.scaler), is_dynamic=dynamic[0])
            return
        for name in SCALER_SETTINGS:
            if hasattr(self.scaler, name):
                setattr(loaded, name, getattr(self.scaler, name))


def innermost(optimizer: Any) -> Any:
    """Return the torch optimizer inside the wrappers of accelerate and DeepSpeed."""
    while getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
    return optimizer


def _states_in_groups(optimizer: Any) -> set[str]:
    """Return keys of parameter groups that are no options: parameters, the current rate, counters among the defaults.

    Schedule-free optimizers count in their groups, in keys that their constructor does not take.
    """
    counters = set(getattr(optimizer, "defaults", ())) - set(inspect.signature(type(optimizer)).parameters)
    return {"params", "lr"} | counters


def _unwrapped(scheduler: Any) -> Any:
    return getattr(scheduler, "scheduler", scheduler)


def _scaler(engine_optimizer: Any) -> Any:
    return getattr(engine_optimizer, "loss_scaler", None) or getattr(engine_optimizer, "loss_scale_config", None)


def _set_scaler(engine_optimizer: Any, scaler: Any, *, is_dynamic: bool) -> None:
    name = "loss_scaler" if getattr(engine_optimizer, "loss_scaler", None) else "loss_scale_config"
    setattr(engine_optimizer, name, scaler)
    if hasattr(engine_optimizer, "dynamic_loss_scale"):
        engine_optimizer.dynamic_loss_scale = is_dynamic
