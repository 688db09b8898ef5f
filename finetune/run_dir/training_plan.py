"""The plan of a run: shown before the first step, kept in run.json, compared with the outcome in the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from finetune.utils.console import labelled


@dataclass(frozen=True)
class TrainingPlan:
    """Everything the ten lines before the first step are made of; plain values."""

    model: str
    parameters: int
    trainable: int
    adapter: str | None
    zero_stage: int | None
    offloads: bool
    world_size: int
    device: str
    per_device_batch: int
    accumulation: int
    data_ranks: int
    sharing: int
    examples: int
    groups: int | None
    group_tokens: int | None
    tokens: int
    supervised_share: float
    batching: str
    padding: float
    selects_logits: bool
    loss_weighting: str
    chat_format: str
    precision: str
    attention: str
    checkpointing: bool
    epochs: float
    steps: int
    held_out: str | None = None
    base_bits: int | None = None
    notes: Sequence[str] = ()  # why batches are not flat, and what runs conversation by conversation
    kinds: Mapping[str, Mapping[str, int | str]] = field(default_factory=dict)  # state, trained and frozen by kind

    def lines(self) -> list[str]:
        """The plan, one labelled line a fact."""
        stage = "none (plain data parallel)" if self.zero_stage is None else f"stage {self.zero_stage}"
        facts = {
            "model": f"{self.model}, {self.parameters:,} parameters",
            "training": f"{self.adapter or 'all parameters'}: {self.trainable:,} trainable "
            f"({self.trainable / self.parameters:.2%})",
            **{f"  {state}": text for state in ("trained", "frozen", "absent") if (text := self._kinds(state))},
            "ZeRO": stage + (", offloaded" if self.offloads else ""),
            "ranks": f"{self.world_size} ({self.device})"
            + (f", {self.sharing} share each conversation" if self.sharing > 1 else ""),
            "data": f"{self.examples:,} examples an epoch, {self.tokens:,} tokens",
            "supervised": f"{self.supervised_share:.1%} of the tokens, rendered with {self.chat_format}",
            **({"held out": self.held_out} if self.held_out else {}),
            "batches": self._batches(),
            **({"  notes": "; ".join(self.notes)} if self.notes else {}),
            "step": self._step(),
            "length": f"{self.steps:,} steps ({self.epochs:.3g} epochs)",
            "precision": self.precision
            + (f", linear layers of the base in {self.base_bits} bits" if self.base_bits else ""),
            "attention": f"{self.attention}, activation checkpointing {'on' if self.checkpointing else 'off'}",
        }
        return labelled(facts)

    def _kinds(self, state: str) -> str:
        """The kinds of modules in this state, with the parameters that are."""
        names = [
            kind + (f" {facts[state]:,}" if state in facts else "")
            for kind, facts in self.kinds.items()
            if facts["state"] == state
        ]
        return ", ".join(names)

    def _batches(self) -> str:
        form = {
            "flat": "flat: no padding",
            "packed": f"packed: {self.tokens / ((self.groups or 1) * (self.group_tokens or 1)):.1%} full",
            "padded": f"padded: {self.padding:.0%} of the positions",
        }[self.batching]
        logits = "supervised positions only" if self.selects_logits else "all positions"
        return f"{form}; logits at {logits}; the loss is a mean over {self.loss_weighting}s"

    def _step(self) -> str:
        units, noun = self.examples, "examples"
        if self.groups is not None:
            units, noun = self.groups, f"rows of up to {self.group_tokens:,} tokens"
        size = self.per_device_batch * self.accumulation * self.data_ranks
        tokens = self.tokens * min(1, size / units)
        each = "ranks" if self.sharing == 1 else "groups of ranks"
        return (
            f"{self.per_device_batch} per device x {self.accumulation} accumulated x {self.data_ranks} {each} = "
            f"{size} {noun}, about {tokens:,.0f} tokens"
        )
