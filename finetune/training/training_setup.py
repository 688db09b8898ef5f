"""How conversations become batches in this run, and the plan that says so before the first step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from finetune.chat_templates import ChatFormat
from finetune.config import Arguments
from finetune.dataset.collator import Collator, pad_token_id
from finetune.dataset.prepare import PreparedData
from finetune.dataset.sampler import BatchShape, Sampler
from finetune.dataset.skip_rows import skip_mask
from finetune.distributed.collectives import first_not_none, run_on_rank_0
from finetune.distributed.startup_timer import start_up_seconds, timed
from finetune.models import adapters
from finetune.run_dir import run_json
from finetune.training.config_check import Setup
from finetune.utils import console
from finetune.utils.errors import ConfigError

logger = logging.getLogger(__name__)


def attach_adapter(arguments: Arguments, base: Any, *, grows: bool, computes_initial: bool = True) -> Any:
    """The base model with the adapter that the flags describe.

    Args:
        grows: the embeddings get rows for new tokens, which must be trained too.
        computes_initial: start as --init_lora_weights says; else with the plain start, for a model without weights.

    Raises:
        ConfigError: no such module, or an adapter that cannot train new embeddings.
    """
    chosen, revision = arguments.adapter, arguments.model.model_revision
    if chosen.kind() != "lora":
        if grows:
            raise ConfigError(
                f"--adapter {chosen.kind()} cannot train the embeddings of new tokens: use --use_lora True"
            )
        return adapters.attach_virtual_tokens(base, chosen.kind(), chosen.num_virtual_tokens, base_revision=revision)
    return adapters.attach_lora(
        base,
        r=chosen.lora_r,
        alpha=chosen.lora_alpha,
        dropout=chosen.lora_dropout,
        target_modules=chosen.lora_target_modules,
        modules_to_save=chosen.modules_to_save,
        use_dora=chosen.use_dora,
        use_rslora=chosen.use_rslora,
        init_lora_weights=chosen.init_lora_weights if computes_initial else "default",
        train_embeddings=grows,
        base_revision=revision,
    )


@timed("model")
def build_dataloaders(
    arguments: Arguments, setup: Setup, training_arguments: Any, trained: Any, tokenizer: Any, data: PreparedData
) -> tuple[Any, Any]:
    """This rank's micro-batches, and those of what is held out or None: as asked, or as this model can."""
    from finetune.dataset.dataloader import MicroBatchDataset, int_column
    from finetune.models.attention import supports_logits_to_keep

    asked, ranks_each = arguments.batch, arguments.batch.sequence_parallel_size
    if not adapters.count_parameters(trained)[0]:
        raise ConfigError("no parameter of this model would be trained: nothing can be learned")
    examples, held_out = data.epoch(training_arguments.seed), data.held_out(training_arguments.seed)
    lengths = int_column(examples, "length")
    obstacle = _flat_obstacle(arguments, setup, training_arguments, trained, data.longest)
    form = batch_layout(
        arguments, int(lengths.max()), obstacle, full_logits_because(arguments, supports_logits_to_keep(trained))
    )
    for note in form.notes:
        logger.warning(note)
    facts = {"batching": form.batching, "selects_logits": form.selects_logits, "notes": [*setup.notes, *form.notes]}
    run_on_rank_0(lambda: run_json.update_run_json(Path(training_arguments.output_dir), facts))
    rank, part = divmod(training_arguments.process_index, ranks_each)
    collator = Collator(
        flat=form.batching != "padded",
        pad_token_id=pad_token_id(tokenizer),
        selects_logits=form.selects_logits,
        weighting=asked.loss_weighting,
        part=(part, ranks_each),
    )
    sampler = train_sampler(arguments, form, lengths, setup.world_size // ranks_each)
    left_out = skip_mask(examples, data.left_out)
    _check_steps(sampler, left_out)
    batches = MicroBatchDataset(
        examples,
        sampler,
        collator,
        rank=rank,
        counts_conversations=asked.loss_weighting == "conversation",
        left_out=left_out,
        sources=list(data.summary.examples_by_source),
    )
    if held_out is None:
        return batches, None
    apart, sources = held_out
    sampler = evaluation_sampler(arguments, form, int_column(apart, "length"), setup.world_size // ranks_each)
    left_out = skip_mask(apart, data.left_out)
    return batches, MicroBatchDataset(apart, sampler, collator, rank=rank, left_out=left_out, sources=sources)


def _flat_obstacle(
    arguments: Arguments, setup: Setup, training_arguments: Any, trained: Any, longest: int
) -> str | None:
    """Switch the model to flat rows where they are asked for; why it cannot run them, or None. All ranks.

    Raises:
        ConfigError: it cannot, and ranks are to share rows.
    """
    from finetune.models.attention import enable_padding_free

    ranks_each, obstacle = arguments.batch.sequence_parallel_size, padding_reason(arguments)
    if arguments.batch.batching != "padded" and not obstacle:
        if setup.zero is None or setup.zero.stage < 3:
            trained.to(training_arguments.device)
        obstacle = enable_padding_free(
            trained,
            longest=longest,
            vocab_size=setup.model.config.get_text_config().vocab_size,
            device=training_arguments.device,
            shared=ranks_each > 1,
            agree=first_not_none,
        )
    if obstacle and ranks_each > 1:
        raise ConfigError(f"--sequence_parallel_size {ranks_each}: ranks can only share flat rows, and {obstacle}")
    return obstacle


def batch_layout(arguments: Arguments, longest: int, obstacle: str | None, full_logits_because: str | None) -> Any:
    """`dataset.dataloader.decide_layout` for these flags."""
    from finetune.dataset.dataloader import decide_layout

    return decide_layout(
        arguments.batch.batching,
        obstacle=obstacle,
        full_logits_because=full_logits_because,
        tokens_per_device=arguments.batch.tokens_per_device_batch,
        per_device_batch=arguments.per_device_batch(),
        model_max_length=arguments.data.model_max_length,
        longest=longest,
        strategy=arguments.given("train_sampling_strategy"),
    )


def train_sampler(arguments: Arguments, form: Any, lengths: Any, data_ranks: int) -> Sampler:
    """Which rows are in which micro-batch, of examples of these lengths."""
    grouped_instead = arguments.batch.batching == "packed" and form.batching == "padded"
    seed = arguments.given("data_seed")
    return Sampler(
        lengths,
        BatchShape(
            per_device_batch=1 if grouped_instead else arguments.per_device_batch(),
            accumulation=arguments.given("gradient_accumulation_steps"),
            world_size=data_ranks,
        ),
        seed=arguments.given("seed") if seed is None else seed,
        batching=form.batching,
        capacity=form.capacity,
        order=form.order,
        drop_last=arguments.given("dataloader_drop_last"),
    )


def evaluation_sampler(arguments: Arguments, form: Any, lengths: Any, data_ranks: int) -> Sampler:
    """Held-out examples in the order of the data, as many a micro-batch as in training unless told otherwise."""
    size = arguments.training.get("per_device_eval_batch_size", arguments.given("per_device_train_batch_size"))
    batching = "padded" if form.batching == "padded" else "flat"
    return Sampler(lengths, BatchShape(size, 1, data_ranks), seed=0, batching=batching, order="sequential")


def _check_steps(sampler: Sampler, left_out: Any) -> None:
    if not sampler.steps_per_epoch:
        raise ConfigError(
            f"--dataloader_drop_last True: {sampler.num_units} examples or groups do not fill one step of "
            f"{sampler.shape.step_size}: no step would be made"
        )
    if left_out.all():
        raise ConfigError("--skip_rows: leaves out every row of the data: nothing can be learned")


def padding_reason(arguments: Arguments) -> str | None:
    """Why these flags need padded rows, whatever the model can do; None: they do not."""
    asked = arguments.model.attn_implementation
    if arguments.given("neftune_noise_alpha") is not None:
        return "NEFTune scales its noise by the length of a row"
    if asked is not None and asked != "sdpa" and "flash" not in asked:
        return f"--attn_implementation {asked} knows no boundaries inside a row"
    return _virtual_tokens(arguments)


def full_logits_because(arguments: Arguments, selects_logits: bool) -> str | None:
    """Why logits cannot be computed at learned positions alone; None: they can.

    Args:
        selects_logits: whether the model's code can.
    """
    return _virtual_tokens(arguments) or (None if selects_logits else "this model's code has no logits_to_keep")


def _virtual_tokens(arguments: Arguments) -> str | None:
    kind = arguments.adapter.kind()
    return f"{kind} tuning puts its virtual tokens in front of each row" if kind in ("prefix", "prompt") else None


def summarize_plan(
    arguments: Arguments,
    setup: Setup,
    trained: Any,
    chat_format: ChatFormat,
    data: PreparedData,
    batches: Any,
    held_out: Any,
    steps: int,
) -> console.TrainingPlan:
    """What is planned, once all of it is known."""
    trainable, parameters = adapters.count_parameters(trained)
    from finetune.dataset.dataloader import padding_share

    sampler, collator = batches.sampler, batches.collate
    return console.TrainingPlan(
        model=arguments.model.model_name_or_path,
        parameters=parameters,
        trainable=trainable,
        adapter=arguments.adapter.kind(),
        zero_stage=setup.zero.stage if setup.zero else None,
        offloads=bool(setup.zero and setup.zero.offloads),
        world_size=setup.world_size,
        device="CPU, gloo" if setup.hardware.use_cpu else "GPU, nccl",
        per_device_batch=sampler.shape.per_device_batch,
        accumulation=sampler.shape.accumulation,
        data_ranks=sampler.shape.world_size,
        sharing=arguments.batch.sequence_parallel_size,
        examples=len(batches),
        groups=None if sampler.capacity is None else sampler.num_units,
        group_tokens=sampler.capacity,
        tokens=int(sampler.lengths.sum()),
        supervised_share=data.summary.supervised_share,
        batching=sampler.batching,
        padding=padding_share(sampler) if sampler.batching == "padded" else 0.0,
        selects_logits=collator.selects_logits,
        loss_weighting=collator.weighting,
        chat_format=chat_format.name,
        precision=setup.hardware.precision,
        attention=trained.config._attn_implementation
        + (", each conversation by itself" if sampler.batching != "padded" else ""),
        checkpointing=setup.activation_checkpointing,
        epochs=steps / sampler.steps_per_epoch,
        steps=steps,
        start_up=start_up_seconds(),
        held_out=_held_out_words(arguments, held_out),
    )


def _held_out_words(arguments: Arguments, held_out: Any) -> str | None:
    if held_out is None:
        return None
    strategy, every = arguments.training.get("eval_strategy", "epoch"), arguments.given("eval_steps")
    when = f"every {every:g} steps" if strategy == "steps" and every else f"by {strategy}"
    return f"{len(held_out):,} examples, {int(held_out.lengths.sum()):,} tokens, evaluated {when}"
