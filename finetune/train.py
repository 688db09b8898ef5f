"""Fine-tune a chat model on conversations.

    # one machine, all its GPUs (or its CPU)
    deepspeed finetune/finetune.py --model_name_or_path M --data_path data/identity.json --output_dir output \
        --deepspeed ds_configs/zero3.json --bf16 True
    # the same, training LoRA adapters
    deepspeed finetune/finetune.py --model_name_or_path M --data_path data/identity.json --output_dir output \
        --deepspeed ds_configs/zero2.json --bf16 True --use_lora True
    # the machines of a hostfile
    deepspeed --hostfile=hostfiles/two_hosts finetune/finetune.py --model_name_or_path M \
        --data_path data/identity.json --output_dir output --deepspeed ds_configs/zero3.json --bf16 True

`main` is the story, one line a stage: parse -> check -> read -> render -> load -> attach -> fit -> seal.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune import adapters, console, model, results
from finetune.arguments import Arguments, parse
from finetune.checking import Setup, check
from finetune.collation import Collator, pad_token_id
from finetune.dataset import PreparedData, check_usable
from finetune.errors import ConfigError, reported
from finetune.hardware import measured_matmul_rate, peak_flops, prepare_environment
from finetune.metrics import loss_curve, model_flops, start_up_seconds, timed
from finetune.preparing import prepare_data
from finetune.rendering import ChatFormat, stop_token_id
from finetune.sampling import Sampler, Shape


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says; the exit statuses are those of `errors`."""
    with reported():
        prepare_environment()
        arguments = parse(sys.argv[1:] if argv is None else argv)
        console.quiet_libraries()
        setup = check(arguments)
        tokenizer, chat_format, data = prepare_data(arguments.model, arguments.data, console.say_note)
        approve(arguments, data)
        training_arguments = begin(arguments, setup, data)
        base = load(arguments, setup, tokenizer, chat_format)
        trained = attach(arguments, setup, base, tokenizer)
        batches = settle(arguments, setup, training_arguments, trained, tokenizer, data)
        trainer = fit(arguments, setup, training_arguments, trained, tokenizer, chat_format, data, batches)
        seal(arguments, trainer)


def approve(arguments: Arguments, data: PreparedData) -> None:
    """Show what the data comes to, and refuse data that the run should not start with."""
    console.say_data(data.summary.lines())
    check_usable(data, arguments.data.max_dropped_rows)


@timed("processes")
def begin(arguments: Arguments, setup: Setup, data: PreparedData) -> Any:
    """Start the processes, build `TrainingArguments` (it touches the devices), claim the output folder."""
    from finetune.trainer import on_rank_0, start_processes

    values = {
        **arguments.training,
        "bf16": setup.hardware.precision == "bf16",
        "fp16": setup.hardware.precision == "fp16",
        "tf32": setup.hardware.tf32,
        "use_cpu": setup.hardware.use_cpu,
        "activation_checkpointing": setup.activation_checkpointing,
        "per_device_train_batch_size": arguments.deepspeed_batch(),
        "deepspeed": setup.zero.config if setup.zero else None,
    }
    if setup.hardware.use_cpu:
        values["dataloader_pin_memory"] = False
    # Liger's fused loss would compute logits of its own; norms, rotations and gates are what is wanted of it.
    values.setdefault("liger_kernel_config", {"fused_linear_cross_entropy": False, "cross_entropy": False})
    training_arguments = start_processes(
        setup.hardware.backend, values, sequence_parallel_size=arguments.batch.sequence_parallel_size
    )
    on_rank_0(lambda: _claim(Path(training_arguments.output_dir), arguments, setup, data))
    return training_arguments


def _claim(output_dir: Path, arguments: Arguments, setup: Setup, data: PreparedData) -> None:
    moved = results.claim_output_dir(output_dir, move_aside=setup.move_aside)
    console.say_notes([moved] if moved else [])
    data.copy_ledger(output_dir / results.LEDGER_FILE)
    results.write_run(output_dir, _facts(arguments, setup, data))


def _facts(arguments: Arguments, setup: Setup, data: PreparedData) -> dict[str, Any]:
    return {
        "arguments": arguments.flat(),
        "notes": list(setup.notes),
        "deepspeed": setup.zero.config if setup.zero else None,
        "versions": results.library_versions(),
        "world_size": setup.world_size,
        "precision": setup.hardware.precision,
        "attention": setup.model.attention,
        "data": {
            "path": arguments.data.data_path,
            "fingerprint": data.fingerprint,
            "summary": data.summary.facts(),
        },
        "completed": False,
    }


@timed("model")
def load(arguments: Arguments, setup: Setup, tokenizer: Any, chat_format: ChatFormat) -> Any:
    """The base model; under ZeRO-3 each rank receives its share while rank 0 reads."""
    return model.load_model(
        setup.model,
        tokenizer,
        precision=setup.hardware.precision if setup.zero else "float32",
        trust_remote_code=arguments.model.trusts_code(),
        stop_token_id=stop_token_id(chat_format),
    )


@timed("model")
def attach(arguments: Arguments, setup: Setup, base: Any, tokenizer: Any) -> Any:
    """The model that is trained: the base itself, or the base with an adapter."""
    from transformers import set_seed

    chosen = arguments.adapter
    if chosen.kind() is None:
        return base
    set_seed(arguments.given("seed"))  # the Trainer sets it only later, and loading draws numbers under ZeRO-3
    grows = model.must_grow(setup.model, tokenizer)
    if chosen.kind() != "lora":
        if grows:
            raise ConfigError(
                f"--adapter {chosen.kind()} cannot train the embeddings of new tokens: use --use_lora True"
            )
        return adapters.attach_virtual_tokens(base, chosen.kind(), chosen.num_virtual_tokens)
    return adapters.attach_lora(
        base,
        r=chosen.lora_r,
        alpha=chosen.lora_alpha,
        dropout=chosen.lora_dropout,
        target_modules=chosen.lora_target_modules,
        modules_to_save=chosen.modules_to_save,
        use_dora=chosen.use_dora,
        use_rslora=chosen.use_rslora,
        init_lora_weights=chosen.init_lora_weights,
        train_embeddings=grows,
    )


@timed("model")
def settle(
    arguments: Arguments, setup: Setup, training_arguments: Any, trained: Any, tokenizer: Any, data: PreparedData
) -> Any:
    """How conversations become batches: as asked, or as this model can; and which rows are in each."""
    from finetune import attention
    from finetune.batches import MicroBatches, column, decide_form
    from finetune.trainer import first_of_all_ranks, on_rank_0

    asked, ranks_each = arguments.batch, arguments.batch.sequence_parallel_size
    examples = data.epoch(training_arguments.seed)
    lengths = column(examples, "length")
    obstacle = _must_pad(arguments)
    if asked.batching != "padded" and not obstacle:
        if setup.zero is None or setup.zero.stage < 3:
            trained.to(training_arguments.device)
        obstacle = attention.make_flat(
            trained,
            longest=int(lengths.max()),
            vocab_size=setup.model.config.get_text_config().vocab_size,
            device=training_arguments.device,
            shared=ranks_each > 1,
            agree=first_of_all_ranks,
        )
    if obstacle and ranks_each > 1:
        raise ConfigError(f"--sequence_parallel_size {ranks_each}: ranks can only share flat rows, and {obstacle}")
    form = decide_form(
        asked.batching,
        obstacle=obstacle,
        full_logits_because=_must_compute_all_logits(arguments, trained),
        tokens_per_device=asked.tokens_per_device_batch,
        per_device_batch=arguments.per_device_batch(),
        model_max_length=arguments.data.model_max_length,
        longest=int(lengths.max()),
        strategy=arguments.given("train_sampling_strategy"),
    )
    console.say_notes(form.notes)
    facts = {"batching": form.batching, "selects_logits": form.selects_logits, "notes": [*setup.notes, *form.notes]}
    on_rank_0(lambda: results.write_run(Path(training_arguments.output_dir), facts))
    grouped_instead = asked.batching == "packed" and form.batching == "padded"
    sampler = Sampler(
        lengths,
        Shape(
            per_device_batch=1 if grouped_instead else arguments.per_device_batch(),
            accumulation=training_arguments.gradient_accumulation_steps,
            world_size=setup.world_size // ranks_each,
        ),
        seed=training_arguments.seed if training_arguments.data_seed is None else training_arguments.data_seed,
        batching=form.batching,
        capacity=form.capacity,
        order=form.order,
        drop_last=training_arguments.dataloader_drop_last,
    )
    collator = Collator(
        flat=form.batching != "padded",
        pad_token_id=pad_token_id(tokenizer),
        selects_logits=form.selects_logits,
        weighting=asked.loss_weighting,
        part=(training_arguments.process_index % ranks_each, ranks_each),
    )
    return MicroBatches(
        examples,
        sampler,
        collator,
        rank=training_arguments.process_index // ranks_each,
        counts_conversations=asked.loss_weighting == "conversation",
    )


def _must_pad(arguments: Arguments) -> str | None:
    kind, asked = arguments.adapter.kind(), arguments.model.attn_implementation
    if kind in ("prefix", "prompt"):
        return f"{kind} tuning puts its virtual tokens in front of each row"
    if arguments.given("neftune_noise_alpha") is not None:
        return "NEFTune scales its noise by the length of a row"
    if asked is not None and asked != "sdpa" and "flash" not in asked:
        return f"--attn_implementation {asked} knows no boundaries inside a row"
    return None


def _must_compute_all_logits(arguments: Arguments, trained: Any) -> str | None:
    kind = arguments.adapter.kind()
    if kind in ("prefix", "prompt"):
        return f"{kind} tuning puts its virtual tokens in front of each row"
    from finetune.attention import selects_logits

    return None if selects_logits(trained) else "this model's code has no logits_to_keep"


def fit(
    arguments: Arguments,
    setup: Setup,
    training_arguments: Any,
    trained: Any,
    tokenizer: Any,
    chat_format: ChatFormat,
    data: PreparedData,
    batches: Any,
) -> Any:
    """Train; the plan is printed once the number of steps is known."""
    from finetune.trainer import SupervisedTrainer

    def announce(steps: int) -> None:
        console.say_plan(_plan(arguments, setup, trained, chat_format, data, batches, steps))

    try:
        trainer = SupervisedTrainer(
            model=trained,
            args=training_arguments,
            micro_batches=batches,
            flops=model_flops(trained),
            peak_flops=_peak_flops(setup),
            processing_class=tokenizer,
            initial_lora=adapters.InitialLora(trained) if _moves_base_weights(arguments) else None,
            on_plan=announce,
        )
    except (ImportError, RuntimeError, ValueError) as error:  # a tracker that is not installed, evaluation without data
        raise ConfigError(f"the Trainer refuses these flags: {error}") from error
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    return trainer


def _peak_flops(setup: Setup) -> float | None:
    """What one rank's device can do in a second, on a CPU what it is seen to do."""
    if setup.hardware.use_cpu:
        return measured_matmul_rate()
    import torch

    return peak_flops(torch.cuda.get_device_name(), setup.hardware.precision, setup.hardware.tf32)


def _plan(
    arguments: Arguments,
    setup: Setup,
    trained: Any,
    chat_format: ChatFormat,
    data: PreparedData,
    batches: Any,
    steps: int,
) -> console.Plan:
    trainable, parameters = adapters.count_parameters(trained)
    from finetune.batches import padding_share

    sampler, collator = batches.sampler, batches.collate
    return console.Plan(
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
        attention=trained.config._attn_implementation,
        checkpointing=setup.activation_checkpointing,
        epochs=steps / sampler.steps_per_epoch,
        steps=steps,
        start_up=start_up_seconds(),
    )


def _moves_base_weights(arguments: Arguments) -> bool:
    return arguments.adapter.kind() == "lora" and adapters.moves_base_weights(arguments.adapter.init_lora_weights)


def seal(arguments: Arguments, trainer: Any) -> None:
    """Save the result, open it again and check it, write down how the run ended, say what to do next."""
    from finetune.trainer import on_rank_0

    trainer.save_state()
    trainer.save_model()
    on_rank_0(lambda: _conclude(arguments, trainer))


def _conclude(arguments: Arguments, trainer: Any) -> None:
    output_dir = Path(trainer.args.output_dir)
    is_adapter = arguments.adapter.kind() is not None
    if is_adapter:
        adapters.verify_saved(output_dir)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in logged]
    result = {"steps": trainer.state.global_step}
    if losses:
        result |= {"first_loss": losses[0], "last_loss": losses[-1]}
    deepspeed_config = trainer.args.hf_deepspeed_config.config if trainer.args.deepspeed else None
    results.write_run(output_dir, {"deepspeed": deepspeed_config, "result": result, "completed": True})
    console.say_summary(
        loss_curve([entry["step"] for entry in logged], losses, console.width()),
        {
            "saved": f"{output_dir} ({'adapter' if is_adapter else 'full model'})",
            "loss": f"{losses[0]:.4f} -> {losses[-1]:.4f}" if losses else "not logged: see --logging_steps",
            "steps": f"{trainer.state.global_step:,}, each in {output_dir / results.METRICS_FILE}",
            "run": str(output_dir / results.RUN_FILE),
        },
        next_command(output_dir),
    )


def next_command(output_dir: Path) -> str:
    """A line that shows the result at work, with plain peft or transformers."""
    loader = (
        "peft import AutoPeftModelForCausalLM"
        if adapters.is_adapter(output_dir)
        else "transformers import AutoModelForCausalLM"
    )
    name = loader.rpartition(" ")[2]
    return f"python -c \"from {loader}; print({name}.from_pretrained('{output_dir}'))\""


if __name__ == "__main__":
    main()
