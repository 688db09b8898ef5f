"""Proof of what was trained: digests of all weights before the first step and after the last one."""

from dataclasses import dataclass
from typing import Any

from finetune.distributed.collectives import all_gather_object, get_rank, get_world_size
from finetune.export.verify_saved import TensorDigest
from finetune.models.module_kinds import ModuleKinds
from finetune.models.zero3 import values_here
from finetune.utils.errors import CheckpointError, format_names


@dataclass(frozen=True)
class WeightChanges:
    """Number of tensors by kind of module: those that are trained, and how many of them changed; those frozen."""

    by_kind: dict[str, dict[str, int]]
    changed: frozenset[str]  # names

    def line(self) -> str:
        """Return the sums as a line for the user."""
        trained, changed, frozen = (
            sum(count[name] for count in self.by_kind.values()) for name in ("trained", "changed", "frozen")
        )
        return f"{changed:,} of {trained:,} trained tensors changed" + (
            f", {frozen:,} frozen ones did not" * (frozen > 0)
        )

    def warnings(self) -> list[str]:
        """Return a line for each kind of which nothing changed although it is trained."""
        return [
            f"no weight of the {kind} changed, although {count['trained']:,} tensors are trained: see their gradients"
            for kind, count in self.by_kind.items()
            if count["trained"] and not count["changed"]
        ]


class WeightProof:
    """The weights of a model before training. Whole tensors are shared out among the ranks, partitions (ZeRO-3) are
    those of their rank; each is read once at the start and once at the end."""

    def __init__(self, model: Any, kinds: ModuleKinds) -> None:
        self.model, self.kinds = model, kinds
        self.before = self._digests()

    def _digests(self) -> dict[str, TensorDigest]:
        rank, ranks = get_rank(), get_world_size()
        return {
            name: TensorDigest.of(values_here(parameter))
            for number, (name, parameter) in enumerate(self.model.named_parameters())
            if hasattr(parameter, "ds_tensor") or number % ranks == rank
        }

    def compare(self) -> WeightChanges:
        """Compare with the weights of now. All ranks.

        Raises:
            CheckpointError: a frozen weight changed.
        """
        now = {name: (digest, self.before[name]) for name, digest in self._digests().items()}
        # A partition that was or is on NVMe has no values here.
        changed = {name for name, (after, before) in now.items() if after != before and after.shape == before.shape}
        changed = set().union(*all_gather_object(changed))
        by_kind: dict[str, dict[str, int]] = {}
        moved = []
        for name, parameter in self.model.named_parameters():
            count = by_kind.setdefault(self.kinds.of(name), {"trained": 0, "changed": 0, "frozen": 0})
            count["trained" if parameter.requires_grad else "frozen"] += 1
            count["changed"] += parameter.requires_grad and name in changed
            moved += [name] * (not parameter.requires_grad and name in changed)
        if moved:
            raise CheckpointError(f"weights that are frozen changed in training: {format_names(moved)}")
        return WeightChanges(by_kind, frozenset(changed))
