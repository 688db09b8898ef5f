"""Fine-tune a chat model on conversations.

    # one machine, all its GPUs (or its CPU)
    deepspeed finetune/finetune.py --model_name_or_path M --data_path data/identity.json --output_dir output \
        --deepspeed ds_configs/zero3.json --bf16 True
    # the machines of a hostfile, LoRA adapters
    deepspeed --hostfile=hostfiles/two_hosts finetune/finetune.py --model_name_or_path M --use_lora True \
        --data_path data/identity.json --output_dir output --deepspeed ds_configs/zero2.json --bf16 True

`run_training` is the story: config -> data -> processes -> checkpoint -> model -> dataloaders -> fit -> finalize.
"""

from finetune.distributed.launcher_processes import die_with_launcher
from finetune.utils import console

if __name__ == "__main__":
    die_with_launcher()  # before the imports, which take seconds
    console.open_standard_streams()
    console.use_utf8()

import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.chat_templates import end_token_ids
from finetune.config import Arguments, RunArguments, flag_words, parse
from finetune.config.hardware import DetectedHardware, detect_hardware
from finetune.config.resolve import resolve_config
from finetune.config.run_config import RankCounts, RunConfig
from finetune.distributed.process_setup import prepare_environment, restore_settings
from finetune.distributed.watchdog import released_watchdog, start_watchdog
from finetune.models.adapters import attach_adapter
from finetune.models.loader import ModelInfo, load_model
from finetune.models.zero3 import set_leaf_modules
from finetune.training import run_start
from finetune.training.data_setup import load_data
from finetune.training.dataloaders import build_dataloaders
from finetune.training.finalize import end_run, finalize
from finetune.training.fit import TrainingInputs, fit
from finetune.training.flag_checks import check_training_flags
from finetune.training.model_checks import check_against_data, check_model
from finetune.training.resume_check import saved_day
from finetune.training.start_checks import check_start, saved_step
from finetune.utils.errors import exit_on_error, process_exit_guard

logger = logging.getLogger("finetune.train")  # the launcher may run this module as __main__


def run() -> None:
    """Run `main` in a process that ends with it."""
    with process_exit_guard():
        main()


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says; exit statuses are those of `utils.errors`."""
    with exit_on_error():
        console.accept_all_characters()
        console.configure_logging()
        run_training(sys.argv[1:] if argv is None else argv)


def run_training(argv: Sequence[str]) -> Path:
    """Train, and return the output_dir.

    Raises:
        FinetuneError: why the run cannot start or continue.
        SystemExit: status 75 after a request to stop, once a checkpoint is saved.
    """
    prepare_environment()
    with start_watchdog():
        arguments = parse(argv)
        timeout = arguments.given("ddp_timeout")
        run_start.set_timeouts(arguments.run)
        check_start(arguments)
        detected = detect_hardware(use_cpu=bool(arguments.given("use_cpu")))
        config, info = resolve(arguments, detected, run_start.count_ranks())
        run, batch, hardware = config.run, config.batch, config.hardware
        console.log_notes(config.notes)
        tokenizer, chat_format, data = load_data(config.model, config.data, saved_day(config.checkpoint))
        config = check_against_data(config, info, tokenizer, data)
        run_start.start_processes(data, info, config.data.data_path, hardware.backend, config.zero_stage, timeout)
        storage = run_start.find_storage(config.checkpoint.output_dir)
        data = run_start.skip_rows(data, run.skip_rows)
        args = run_start.build_training_arguments(config.training_values(), storage, batch.sequence_parallel_size)
        identity = run_start.start_run(config, storage, data, chat_format, info.fingerprint)
        stop = end_token_ids(chat_format)[0]
        model = load_model(info, tokenizer, config.weights_precision, stop, hardware.precision)
        model = attach_adapter(
            model, config.adapter, info, tokenizer, seed=batch.seed, precision=config.adapter_precision
        )
        set_leaf_modules(model, info.kinds, info.empty)
        loaders = build_dataloaders(batch, model, tokenizer, data, args.device, config.zero_stage, hardware.precision)
        run_start.record_model(config.checkpoint.output_dir, info, loaders.layout, config.notes)
        inputs = TrainingInputs(model, tokenizer, chat_format, data, loaders, args, info)
        trainer = fit(inputs, identity, config)
        finalize(trainer, info, is_adapter=config.adapter.kind() is not None, precision=hardware.precision)
        end_run(trainer, partial(write_report, run, trusts_code=config.model.trusts_code()))
    return config.checkpoint.output_dir


def resolve(arguments: Arguments, hardware: DetectedHardware, ranks: RankCounts) -> tuple[RunConfig, ModelInfo]:
    """Resolve and check all that needs neither data nor weights; `finetune doctor` calls it, too.

    Raises:
        ConfigError: flags that exclude each other, or that the model, the hardware or the ranks cannot do.
    """
    config = resolve_config(arguments, hardware, ranks, saved_step(arguments, ranks.size))
    check_training_flags(
        config.training_values(),
        arguments.given_flags(),
        builds_optimizer=config.deepspeed is None or "optimizer" not in config.deepspeed.config,
    )
    return check_model(config)


def write_report(run: RunArguments, output_dir: Path, was_stopped: bool, *, trusts_code: bool = False) -> None:
    """Write report.html on rank 0 once the other ranks are gone; the result does not depend on it."""
    if console.is_rank_0() and run.write_report:
        from finetune.report import write_at_the_end

        answers = 0 if was_stopped else run.report_answers
        line = write_at_the_end(output_dir, answers=answers, seconds=run.report_seconds, trusts_code=trusts_code)
        logger.info(f"Report:\n  {line}\n")


class _TrainModule(ModuleType):
    """This module can be called: `finetune.train(...)` is public, and the launcher needs a module of the same name."""

    def __call__(self, **flags: Any) -> Path:
        """Train in this process with flags as keyword arguments; see `finetune.train`."""
        with restore_settings(), released_watchdog():
            return run_training(flag_words(flags))


sys.modules[__name__].__class__ = _TrainModule

if __name__ == "__main__":
    run()
