"""`finetune evaluate`: compare a result with its base on held-out rows, benchmarks and what the base could do."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetune.config import DataArguments
from finetune.config.argument_parser import below, data_faults
from finetune.config.arguments import VERIFY_KEY_HELP
from finetune.dataset.data_sources import find_local_sources
from finetune.distributed.collectives import destroy_process_group, init_process_group, run_on_rank_0
from finetune.distributed.process_setup import enable_gc, keep_freed_blocks, prepare_environment
from finetune.evaluation.task_names import check_names
from finetune.inference.run_result import TRUST_HELP, RunResult, read_result
from finetune.report.preview_terminal import print_sections
from finetune.run_dir import eval_results
from finetune.run_dir.eval_results import BENCHMARKS_FILE, FORGETTING_FILE, HELD_OUT_FILE
from finetune.utils.console import accept_all_characters, configure_logging, is_rank_0, quiet_libraries
from finetune.utils.errors import FinetuneError, raise_faults
from finetune.utils.options import CommandParser, fill, option, positional

SECONDS_TO_WAIT = 24 * 3600  # one rank may run the programs of a benchmark while the others wait
FLAGS_OF_DATA = (
    "data_path", "model_max_length", "too_long", "train_on", "bad_rows", "max_dropped_rows", "repairs", "columns",
    "data_cache_dir", "preprocessing_num_workers", "chat_template_kwargs",
)  # fmt: skip
# What is measured -> the flags that have no effect without it.
FLAGS_ABOUT = {
    "data_path": ("tokens_per_batch", "tool_rows", "worst", *FLAGS_OF_DATA[1:-1]),
    "tasks": ("num_fewshot", "limit", "batch_size", "apply_chat_template", "allow_code_execution"),
    "forgetting": ("fail_below",),
}


@dataclass(frozen=True)
class EvaluateOptions:
    """Compare the result in OUTPUT with its base, on at least one of --data_path, --tasks and --forgetting.

    These are held-out conversations, tasks of lm-evaluation-harness, and what the base could do before. Under torchrun
    or `deepspeed --module finetune evaluate ...` the ranks divide the work.
    """

    output: str = positional("OUTPUT", "the output_dir of a run, or a checkpoint in it")
    base_model: str | None = option(None, "where the base model is now; default: where it was")
    trust_remote_code: bool = option(False, TRUST_HELP)
    verify_key: str | None = option(None, VERIFY_KEY_HELP)
    no_base: bool = option(False, "do not measure the base beside the tuned model")
    json: bool = option(False, "print what is stored as one JSON object, instead of tables")
    tokens_per_batch: int = option(2048, "conversations are measured together up to so many tokens")
    tool_rows: int = option(100, "rows with tools of which the models write the answers, the first ones; 0: none")
    worst: int = option(5, "rows to show: those with the largest loss, and those that became worse most")
    tasks: list[str] = option(
        [], "`lingowhale` (the eight benchmarks of its table), tasks of lm-eval, YAML files or folders of tasks"
    )
    num_fewshot: int | None = option(None, "examples in front of each question of a task; default: the task's own")
    limit: int | None = option(None, "ask only the first so many questions of each task: to try it out")
    batch_size: str = option("auto", "questions of a task that are asked together: a number, or `auto`")
    apply_chat_template: bool = option(
        False, "ask tasks in the chat format; without it as plain text, as published scores are measured"
    )
    allow_code_execution: bool = option(False, "run programs that the model has written (HumanEval), on this machine")
    forgetting: bool = option(False, "ask what the base could do, 244 questions that come with the project")
    fail_below: float | None = option(
        None, "end with status 1 where `--forgetting` finds the tuned model more points below the base, e.g. 5"
    )


def build_parser() -> CommandParser:
    """Build the parser of `finetune evaluate`."""
    usage = "OUTPUT [--data_path D [D ...]] [--tasks T [T ...]] [--forgetting]"
    parser = CommandParser("finetune evaluate", usage, EvaluateOptions)
    parser.add_group(DataArguments, only=FLAGS_OF_DATA, is_optional=True)
    return parser


def parse_options(argv: Sequence[str]) -> tuple[EvaluateOptions, dict[str, Any]]:
    """Return what to measure, and the flags of the data that were given; the others are those of the training."""
    given = build_parser().parse(argv)
    options = fill(EvaluateOptions, given)
    data = {name: given[name] for name in FLAGS_OF_DATA if name in given}
    raise_faults([*data_faults(fill(DataArguments, data)), *_faults(options, given)])
    return options, data


def _faults(options: EvaluateOptions, given: dict[str, Any]) -> Iterator[str]:
    if not any(map(given.get, FLAGS_ABOUT)):
        yield "nothing to evaluate: give --data_path, --tasks or --forgetting"
    for name in ("tokens_per_batch", "limit"):
        yield from below(1, name, getattr(options, name))
    for name in ("tool_rows", "worst", "num_fewshot", "fail_below"):
        yield from below(0, name, getattr(options, name))
    if options.batch_size != "auto" and (not options.batch_size.isdigit() or int(options.batch_size) < 1):
        yield f"--batch_size {options.batch_size}: expected a number or auto"
    if options.forgetting and options.no_base:
        yield "--forgetting compares with the base: leave --no_base out"
    for measured, names in FLAGS_ABOUT.items():
        if not given.get(measured):
            yield from (f"--{name} is about --{measured}: give it too" for name in names if name in given)


def main(argv: Sequence[str]) -> None:
    """Measure what is requested, store it in the output_dir and print it."""
    options, data = parse_options(argv)
    configure_logging(to_stderr=True)
    prepare_environment()
    accept_all_characters(utf8=options.json)
    result = read_result(
        Path(options.output), trust_remote_code=options.trust_remote_code, verify_key=options.verify_key
    ).with_template_kwargs(data.get("chat_template_kwargs"))
    find_local_sources(data.get("data_path", ()), ())
    if options.tasks:
        check_names(options.tasks)
    if result.adapter is not None or not options.no_base:
        result.base_path(options.base_model)
    requested = {
        HELD_OUT_FILE: bool(data.get("data_path")),
        BENCHMARKS_FILE: bool(options.tasks),
        FORGETTING_FILE: options.forgetting,
    }
    for name in (name for name, is_requested in requested.items() if is_requested):
        eval_results.check_writable(result.folder, name)
    documents = _measure(result, options, data)
    for name, document in documents.items():
        run_on_rank_0(partial(eval_results.write_results, result.folder, name, document))
    if is_rank_0():
        _show(result, documents, as_json=options.json)
    destroy_process_group()
    _fail_if_below(documents.get(FORGETTING_FILE), options.fail_below)


def _measure(result: RunResult, options: EvaluateOptions, data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the documents by the names of their files; data and tasks are checked before the model loads."""
    quiet_libraries()
    import torch

    from finetune.evaluation import benchmarks, forgetting, held_out, tool_calls
    from finetune.inference.load_result import load_for_inference

    prepared = held_out.prepare_held_out(result, data) if data.get("data_path") else None
    jobs: list[Any] = []
    if options.tasks:
        jobs = benchmarks.find_jobs(
            options.tasks, num_fewshot=options.num_fewshot, allow_code=options.allow_code_execution
        )
    init_process_group("nccl" if torch.cuda.is_available() else "gloo", uses_deepspeed=False, timeout=SECONDS_TO_WAIT)
    enable_gc()
    keep_freed_blocks()
    loaded = load_for_inference(result, base_name=options.base_model)
    loaded.with_base = not options.no_base
    documents: dict[str, Any] = {}
    if prepared is not None:
        documents[HELD_OUT_FILE] = held_out.evaluate_held_out(
            loaded, prepared, tokens_per_batch=options.tokens_per_batch, worst=options.worst
        )
        conversations = tool_calls.rows_with_tools(prepared.sources, data.get("repairs", ()), options.tool_rows)
        if conversations:
            documents[HELD_OUT_FILE]["tool_calls"] = tool_calls.evaluate_tool_calls(loaded, conversations)
    if jobs:
        documents[BENCHMARKS_FILE] = benchmarks.evaluate_benchmarks(
            loaded,
            jobs,
            limit=options.limit,
            batch_size=options.batch_size,
            apply_chat_template=options.apply_chat_template,
            allow_code=options.allow_code_execution,
        )
    if options.forgetting:
        documents[FORGETTING_FILE] = forgetting.evaluate_forgetting(loaded)
    measured = {"result": str(result.folder), "base": options.base_model or result.base["name"]}
    return {name: eval_results.versioned({**measured, **document}) for name, document in documents.items()}


def _show(result: RunResult, documents: dict[str, dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({Path(name).stem: document for name, document in documents.items()}, ensure_ascii=False))
    else:
        for name, document in documents.items():
            print_sections(eval_results.SECTIONS[name](document))
        print(f"\nstored in {' and '.join(str(result.folder / name) for name in documents)}")
    sys.stdout.flush()


def _fail_if_below(document: dict[str, Any] | None, allowed: float | None) -> None:
    if document is not None and allowed is not None and document["fell"] > allowed:
        error = FinetuneError(
            f"the tuned model is {document['fell']:.1f} points below its base, --fail_below allows {allowed:g}"
        )
        error.is_shared = True
        raise error
