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

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import adapters, console, model, results
from finetune.arguments import Arguments, DataArguments, ModelArguments, parse
from finetune.collation import PaddedCollator, pad_token_id
from finetune.conversations import find_sources
from finetune.dataset import PreparedData, check_usable, prepare
from finetune.errors import ConfigError, reported
from finetune.hardware import Hardware, build_notes, check_extension_locks, decide, prepare_environment, probe
from finetune.metrics import loss_curve
from finetune.rendering import ChatFormat, Renderer, add_control_tokens, choose_format, stop_token_id
from finetune.zero import CommandLine, ResolvedConfig, find_config, load_config, resolve


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
        trainer = fit(arguments, setup, training_arguments, trained, tokenizer, chat_format, data)
        seal(arguments, trainer)


@dataclass(frozen=True)
class Setup:
    """What was found and decided before anything expensive."""

    hardware: Hardware
    zero: ResolvedConfig | None
    model: model.CheckedModel
    world_size: int
    move_aside: bool
    activation_checkpointing: bool
    notes: tuple[str, ...]


def check(arguments: Arguments) -> Setup:
    """Everything that can be found wrong without reading data or weights."""
    output_dir = Path(arguments.training["output_dir"]).expanduser()
    if output_dir.resolve() == Path(arguments.model.model_name_or_path).expanduser().resolve():
        raise ConfigError(f"--output_dir {output_dir}: is the folder of the model itself")
    if arguments.given("eval_strategy") not in ("no", None):
        raise ConfigError("--eval_strategy: there is no evaluation data in this version: leave the flag out")
    move_aside = results.check_output_dir(
        output_dir,
        overwrite=arguments.run.overwrite_output_dir,
        resume=bool(arguments.given("resume_from_checkpoint")),
    )
    hardware = decide(
        probe(use_cpu=bool(arguments.given("use_cpu"))),
        bf16=bool(arguments.given("bf16")),
        fp16=bool(arguments.given("fp16")),
        tf32=arguments.given("tf32"),
        attn_implementation=arguments.model.attn_implementation,
    )
    world_size = int(os.environ["WORLD_SIZE"])
    zero = _resolve_zero(arguments, hardware, world_size)
    checked = model.check(
        arguments.model.model_name_or_path,
        trust_remote_code=arguments.model.trusts_code(),
        attention=hardware.attention,
    )
    checkpointing, checkpointing_notes = _checkpointing(arguments, checked)
    building = []
    if zero is not None:
        extensions = Path(os.environ["TORCH_EXTENSIONS_DIR"])
        check_extension_locks(extensions)
        building = build_notes(extensions, use_cpu=hardware.use_cpu)
    notes = (
        *arguments.notes,
        *hardware.notes,
        *(zero.notes if zero else ()),
        *checked.notes,
        *checkpointing_notes,
        *building,
    )
    console.say_notes(notes)
    return Setup(hardware, zero, checked, world_size, move_aside, checkpointing, notes)


def _resolve_zero(arguments: Arguments, hardware: Hardware, world_size: int) -> ResolvedConfig | None:
    name = arguments.given("deepspeed")
    if not name:
        return None
    asked = "bf16" if arguments.given("bf16") else "fp16" if arguments.given("fp16") else "float32"
    command = CommandLine(
        **{
            flag: arguments.given(flag)
            for flag in CommandLine.__dataclass_fields__
            if flag not in ("precision", "precision_was_replaced")
        },
        precision=hardware.precision,
        precision_was_replaced=asked != hardware.precision,
    )
    path = find_config(name)
    return resolve(
        path,
        load_config(path),
        command,
        world_size=world_size,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size),
        use_cpu=hardware.use_cpu,
    )


def _checkpointing(arguments: Arguments, checked: model.CheckedModel) -> tuple[bool, list[str]]:
    wanted = bool(arguments.given("activation_checkpointing"))
    if wanted and arguments.adapter.kind() == "prefix":
        return False, [
            "--gradient_checkpointing is off: prefix tuning hands each layer a cache, which checkpointing would drop"
        ]
    if wanted and not checked.can_checkpoint:
        return False, ["--gradient_checkpointing is off: this model's code does not support it"]
    return wanted, []


def load_format(chosen: ModelArguments, data: DataArguments) -> tuple[Any, ChatFormat, list[str]]:
    """The tokenizer with new tokens added, the chat format of the run, and lines for the user."""
    tokenizer = model.load_tokenizer(chosen.model_name_or_path, trust_remote_code=chosen.trusts_code())
    add_control_tokens(tokenizer, chosen.new_tokens)
    chat_format, notes = choose_format(
        tokenizer,
        data.chat_template,
        human_token_ids=data.human_token_ids,
        model_token_ids=data.model_token_ids,
        is_lingowhale=chosen.is_lingowhale(),
        content_tokens=data.content_tokens,
    )
    return tokenizer, chat_format, notes


def prepare_data(
    chosen: ModelArguments, data: DataArguments, say: Callable[[str], None]
) -> tuple[Any, ChatFormat, PreparedData]:
    """The tokenizer, the chat format, and all rows read, rendered and proven; `say` takes lines for the user."""
    sources = find_sources(data.data_path)
    tokenizer, chat_format, notes = load_format(chosen, data)
    for note in notes:
        say(note)
    prepared = prepare(
        sources,
        Renderer(chat_format, data.model_max_length, too_long=data.too_long, train_on=data.train_on),
        bad_rows=data.bad_rows,
        repairs=data.repairs,
        cache_dir=data.data_cache_dir,
        num_processes=data.preprocessing_num_workers,
        say=say,
    )
    for line in prepared.said:
        say(line)
    return tokenizer, chat_format, prepared


def approve(arguments: Arguments, data: PreparedData) -> None:
    """Show what the data comes to, and refuse data that the run should not start with."""
    console.say_data(data.summary.lines())
    check_usable(data, arguments.data.max_dropped_rows)


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
        "deepspeed": setup.zero.config if setup.zero else None,
    }
    if setup.hardware.use_cpu:
        values["dataloader_pin_memory"] = False
    training_arguments = start_processes(setup.hardware.backend, values)
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


def load(arguments: Arguments, setup: Setup, tokenizer: Any, chat_format: ChatFormat) -> Any:
    """The base model; under ZeRO-3 each rank receives its share while rank 0 reads."""
    return model.load_model(
        setup.model,
        tokenizer,
        precision=setup.hardware.precision if setup.zero else "float32",
        trust_remote_code=arguments.model.trusts_code(),
        stop_token_id=stop_token_id(chat_format),
    )


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


def fit(
    arguments: Arguments,
    setup: Setup,
    training_arguments: Any,
    trained: Any,
    tokenizer: Any,
    chat_format: ChatFormat,
    data: PreparedData,
) -> Any:
    """Train; the plan is printed once the number of steps is known."""
    from finetune.trainer import SupervisedTrainer

    def announce(steps: int) -> None:
        console.say_plan(_plan(arguments, setup, training_arguments, trained, chat_format, data, steps))

    try:
        trainer = SupervisedTrainer(
            model=trained,
            args=training_arguments,
            train_dataset=data.epoch(training_arguments.seed),
            data_collator=PaddedCollator(pad_token_id(tokenizer)),
            processing_class=tokenizer,
            initial_lora=adapters.InitialLora(trained) if _moves_base_weights(arguments) else None,
            on_plan=announce,
        )
    except (ImportError, RuntimeError, ValueError) as error:  # a tracker that is not installed, evaluation without data
        raise ConfigError(f"the Trainer refuses these flags: {error}") from error
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    return trainer


def _plan(
    arguments: Arguments,
    setup: Setup,
    training_arguments: Any,
    trained: Any,
    chat_format: ChatFormat,
    data: PreparedData,
    steps: int,
) -> console.Plan:
    trainable, parameters = adapters.count_parameters(trained)
    examples = len(data.epoch(training_arguments.seed))
    micro, accumulation = (
        training_arguments.per_device_train_batch_size,
        training_arguments.gradient_accumulation_steps,
    )
    return console.Plan(
        model=arguments.model.model_name_or_path,
        parameters=parameters,
        trainable=trainable,
        adapter=arguments.adapter.kind(),
        zero_stage=setup.zero.stage if setup.zero else None,
        offloads=bool(setup.zero and setup.zero.offloads),
        world_size=setup.world_size,
        device="CPU, gloo" if setup.hardware.use_cpu else "GPU, nccl",
        per_device_batch=micro,
        accumulation=accumulation,
        tokens_per_example=data.summary.tokens / data.summary.examples,
        supervised_share=data.summary.supervised_share,
        examples=examples,
        chat_format=chat_format.name,
        precision=setup.hardware.precision,
        attention=setup.model.attention,
        checkpointing=setup.activation_checkpointing,
        epochs=steps / math.ceil(examples / (micro * accumulation * setup.world_size)),
        steps=steps,
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
