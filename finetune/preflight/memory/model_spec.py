"""Model and run as plain numbers, for the memory estimate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finetune.config.hardware import Precision

OffloadDevice = Literal["none", "cpu", "nvme"]
# With their scales (bitsandbytes 0.50): blocks of 64 weights in 4 bits share one of 8 bits, and 256 of these one of 32;
# rows of weights in 8 bits share one of 32 bits, which is not counted.
BYTES_PER_WEIGHT = {4: 0.5 + (1 + 4 / 256) / 64, 8: 1.0}
BYTES = {"float32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Block:
    """Parameters of one size: `count` of `size` elements each, trained or frozen."""

    size: int
    count: int
    trained: bool = True

    @property
    def elements(self) -> int:
        return self.size * self.count


@dataclass(frozen=True)
class Activations:
    """Bytes per token that a forward pass keeps for the backward pass, in the precision of the run."""

    layer: float  # in one layer (the mean of all)
    outside: float  # outside the layers
    layer_input: float  # the input of a checkpointed layer
    working: float  # peak inside one layer beyond what the layer keeps
    recomputing: float  # peak of recomputing one checkpointed layer and its backward pass
    logit: float  # per position with logits: these, and what the head keeps
    logit_working: float  # peak beyond it
    fixed: float = 0.0  # in one layer, independent of the tokens: copies of weights that an adapter on experts makes
    frozen_inputs: float = 0.0  # in one layer; inputs that ZeRO-3's linear layers keep even if the weight is frozen
    # In one layer, per pair of tokens, if attention has no fused kernel: what a padded row keeps, the peak beyond it.
    scores: float = 0.0
    scores_working: float = 0.0
    scored_heads: int = 0  # of that attention
    is_traced: bool = True  # measured on the model; else from the formula for a plain decoder


@dataclass(frozen=True)
class ModelSpec:
    """A model."""

    blocks: tuple[Block, ...]  # all parameters, adapters included, a tied one once
    activations: Activations
    layers: int
    hidden: int
    vocabulary: int
    embedding: int  # parameters of the input embeddings
    tied: bool  # the head is the same parameter
    stored_bytes: int  # of the files that it is loaded from
    largest_module: int  # parameters that one module holds itself; ZeRO-3 gathers at least that many
    active: int  # parameters that process one token; fewer than all in a mixture of experts
    experts: int = 0  # per layer; 0 in a dense model
    experts_per_token: int = 0
    quantizable: int = 0  # parameters that bitsandbytes would pack: linear layers without the head
    largest_quantizable: int = 0  # of one layer
    bits: int | None = None  # 4 or 8 where they are packed
    adapter: bool = False  # it has an adapter, so checkpoints and result hold only the trained parameters

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(block.elements for block in self.blocks)

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        return sum(block.elements for block in self.blocks if block.trained)

    def weight_bytes(self, size: int, parameters: float | None = None) -> float:
        """Return the bytes of so many parameters (None: all) of `size` bytes each where they are not packed."""
        if self.bits is None:
            return size * (self.parameters if parameters is None else parameters)
        whole = size * (self.parameters - self.quantizable) + BYTES_PER_WEIGHT[self.bits] * self.quantizable
        return whole if parameters is None else whole * parameters / self.parameters

    def state_bytes(self, run: RunSpec) -> float:
        """Return the bytes of optimizer states for each trained parameter."""
        matrices = self.trainable if self.adapter else min(self.quantizable, self.trainable)
        return run.optimizer_bytes - (4 * matrices / max(self.trainable, 1) if run.muon else 0)

    @property
    def unpacked_layer(self) -> int:
        """Parameters of the largest packed layer, which is unpacked to be multiplied."""
        return self.largest_quantizable if self.bits else 0

    @property
    def expert_parameters(self) -> int:
        """Number of parameters of all experts, active or not."""
        if not self.experts:
            return 0
        return round((self.parameters - self.active) / (1 - self.experts_per_token / self.experts))

    @property
    def largest_trained(self) -> int:
        """Elements of the largest trained tensor."""
        return max((block.size for block in self.blocks if block.trained), default=0)

    def small_parameters(self, most: int) -> int:
        """Return the parameters in tensors of at most so many elements."""
        return sum(block.elements for block in self.blocks if block.size <= most)


def plain_activations(
    *, hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int, vocabulary: int, gated: bool, size: int
) -> Activations:
    """Return the formula for a plain decoder in elements of `size` bytes, for models that cannot be traced.

    A layer keeps two norms (input and inverse root in float32, normalized and weighted result), queries, keys, values,
    the result of attention and the log of its sums, and the MLP's activation input and output, the other branch and
    their product. From transformers' Llama; the usual 34 bytes x hidden (Korthikanti et al., Reducing activation
    recomputation, 2022) is for GPT's ungated MLP.
    """
    norms = 2 * (4 * hidden + 4 + 2 * size * hidden)
    attention = size * (2 * heads + 2 * kv_heads) * head_dim + 4 * heads
    mlp = size * (4 if gated else 2) * intermediate
    layer = norms + attention + mlp
    return Activations(
        layer=layer,
        outside=4 * hidden + 2 * size * hidden + 2 * size * head_dim + 16,
        layer_input=size * hidden,
        working=size * (2 * hidden + 2 * intermediate),
        recomputing=layer + size * (2 * hidden + 2 * intermediate),
        logit=size * (hidden + vocabulary),
        logit_working=size * hidden,
        is_traced=False,
    )


@dataclass(frozen=True)
class RunSpec:
    """A run: its ranks, the largest micro-batch of a rank, and the settings of DeepSpeed in elements."""

    stage: int | None  # of ZeRO; None: without DeepSpeed
    ranks: int
    tokens: int  # positions of the largest micro-batch, padding included
    logits: int  # those of them that get logits; all, if the model's code cannot select
    precision: Precision = "bf16"
    use_cpu: bool = False
    ranks_on_host: int | None = None  # on the host that has most
    rows: int = 1  # of the largest micro-batch
    longest: int = 0  # tokens of its longest row
    flash_attention: bool = False
    padded: bool = False  # rows are padded to the longest one, so attention gets a mask
    checkpoint_every: int = 0  # activations of each n-th layer are recomputed; 0: of none
    checkpoints_to_host: bool = False  # the inputs that these layers keep are in host memory
    accumulation: int = 1
    offload_optimizer: OffloadDevice = "none"
    offload_parameters: OffloadDevice = "none"
    reduce_bucket: int | None = 500_000_000  # None: transformers' "auto" (hidden x hidden)
    prefetch_bucket: int | None = None  # None: "auto" (0.9 x hidden x hidden)
    persistence_threshold: int | None = None  # None: "auto" (10 x hidden)
    max_live: int = 1_000_000_000  # what ZeRO-3 keeps gathered for its next use
    max_in_cpu: int = 1_000_000_000  # parameters that stay in memory when they are offloaded to NVMe
    sub_group: int = 1_000_000_000  # what ZeRO-3's optimizer updates at a time
    optimizer_bytes: float = 8.0  # of states for each trained parameter
    muon: bool = False  # matrices have a momentum alone
    overlap_comm: bool = False  # two buckets instead of one, under stages 1 and 2
    sequence_parallel: int = 1  # ranks that share each row
    hpz: int = 1  # ranks that share a second copy of the weights (ZeRO++); 1: none
    keep_checkpoints: int | None = 2  # how many are kept; None: all
    only_model: bool = False  # checkpoints without the state of the optimizer

    @property
    def on_host(self) -> int:
        """Ranks on the host that has most."""
        return self.ranks if self.ranks_on_host is None else self.ranks_on_host

    def checkpointed_layers(self, layers: int) -> int:
        """Return how many of the layers are recomputed."""
        return -(-layers // self.checkpoint_every) if self.checkpoint_every else 0

    @property
    def size(self) -> int:
        """Bytes of a weight."""
        return BYTES[self.precision]


def from_deepspeed(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the fields of a `RunSpec` that a resolved DeepSpeed config decides; None: a run without DeepSpeed.

    An absent key has DeepSpeed's own default (runtime/zero/config.py), "auto" is filled by transformers.
    """
    if config is None:
        return {"stage": None}
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)

    def number(key: str, default: int) -> int | None:
        value = zero.get(key, default)
        return None if value == "auto" else int(value)

    offloaded = {"offload_optimizer": "offload_optimizer", "offload_parameters": "offload_param"}
    places = {name: zero.get(key) or {} for name, key in offloaded.items()}
    fields: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket": number("reduce_bucket_size", 500_000_000),
        "overlap_comm": bool(zero.get("overlap_comm", False)) and stage in (1, 2),
        "muon": str(config.get("optimizer", {}).get("type")).lower() == "muon",
        "sequence_parallel": int(config.get("sequence_parallel_size", 1)),
        **{name: place.get("device", "none") for name, place in places.items()},
    }
    if stage == 3:
        fields |= {
            "prefetch_bucket": number("stage3_prefetch_bucket_size", 50_000_000),
            "persistence_threshold": number("stage3_param_persistence_threshold", 100_000),
            "max_live": number("stage3_max_reuse_distance", 1_000_000_000),
            "sub_group": number("sub_group_size", 1_000_000_000),
            "max_in_cpu": int(places["offload_parameters"].get("max_in_cpu", 1_000_000_000)),
            "hpz": int(zero.get("zero_hpz_partition_size", 1)),
        }
    return fields
