"""`finetune evaluate`: is it better? A result beside its base, on rows, on benchmarks, on what was known before."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.config import EvaluateArguments, parse_for_evaluate
from finetune.distributed.collectives import destroy_process_group, init_process_group, run_on_rank_0
from finetune.distributed.process_setup import enable_gc, keep_freed_blocks, prepare_environment
from finetune.evaluation.held_out_data import prepare_held_out
from finetune.evaluation.result_tables import print_sections
from finetune.inference.run_result import RunResult, read_result
from finetune.run_dir import eval_results
from finetune.run_dir.eval_results import BENCHMARKS_FILE, FORGETTING_FILE, HELD_OUT_FILE
from finetune.utils.console import is_rank_0, quiet_libraries, say_note_aside
from finetune.utils.errors import FinetuneError

SECONDS_TO_WAIT = 24 * 3600  # one rank may run the programs of a benchmark while the others wait


def main(argv: Sequence[str]) -> None:
    """Read the result, measure what is asked for, store it beside the result and show it.

    Raises:
        ConfigError: no result, no base, a task that there is not, a package that is missing.
        DataError: held-out rows with faults.
        FinetuneError: the tuned model is further below the base than --fail_below allows.
    """
    folder, chosen, data = parse_for_evaluate(argv)
    prepare_environment()
    sys.stdout.reconfigure(encoding="utf-8" if chosen.json else None, errors="backslashreplace")
    result = read_result(Path(folder))
    asked = {
        HELD_OUT_FILE: bool(data.get("data_path")),
        BENCHMARKS_FILE: bool(chosen.tasks),
        FORGETTING_FILE: chosen.forgetting,
    }
    for name in (name for name, is_asked in asked.items() if is_asked):
        eval_results.check_writable(result.folder, name)
    found = {name: eval_results.versioned(one) for name, one in _measured(result, chosen, data).items()}
    for name, document in found.items():
        run_on_rank_0(lambda name=name, document=document: eval_results.write_results(result.folder, name, document))
    if is_rank_0():
        _show(result, found, as_json=chosen.json)
    destroy_process_group()
    _fail_if_below(found.get(FORGETTING_FILE), chosen.fail_below)


def _measured(result: RunResult, chosen: EvaluateArguments, data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The documents, by the name of their files; data and tasks are looked at before the model loads."""
    quiet_libraries()
    prepared = prepare_held_out(result, data, say_note_aside) if data.get("data_path") else None
    jobs = _find_jobs(chosen) if chosen.tasks else []
    import torch

    from finetune.inference.load_result import load_for_inference

    init_process_group("nccl" if torch.cuda.is_available() else "gloo", uses_deepspeed=False, timeout=SECONDS_TO_WAIT)
    enable_gc()
    keep_freed_blocks()
    opened = load_for_inference(result, base_name=chosen.base_model)
    found = {}
    if prepared is not None:
        from finetune.evaluation.held_out import evaluate_held_out

        found[HELD_OUT_FILE] = evaluate_held_out(
            opened,
            prepared,
            with_base=not chosen.no_base,
            tokens_per_batch=chosen.tokens_per_batch,
            worst=chosen.worst,
            bar=_bar,
            say=say_note_aside,
        )
    if jobs:
        from finetune.evaluation.benchmarks import evaluate_benchmarks

        found[BENCHMARKS_FILE] = evaluate_benchmarks(
            opened,
            jobs,
            with_base=not chosen.no_base,
            limit=chosen.limit,
            batch_size=chosen.batch_size,
            apply_chat_template=chosen.apply_chat_template,
            allow_code=chosen.allow_code_execution,
        )
    if chosen.forgetting:
        from finetune.evaluation.forgetting import evaluate_forgetting

        found[FORGETTING_FILE] = evaluate_forgetting(opened, bar=_bar)
    return found


def _find_jobs(chosen: EvaluateArguments) -> list[Any]:
    from finetune.evaluation.benchmarks import find_jobs

    return find_jobs(
        chosen.tasks, num_fewshot=chosen.num_fewshot, allow_code=chosen.allow_code_execution, say=say_note_aside
    )


def _show(result: RunResult, found: dict[str, dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({Path(name).stem: document for name, document in found.items()}, ensure_ascii=False))
    else:
        for name, document in found.items():
            print_sections(eval_results.SECTIONS[name](document))
        print(f"\nstored in {' and '.join(str(result.folder / name) for name in found)}")
    sys.stdout.flush()


def _fail_if_below(document: dict[str, Any] | None, allowed: float | None) -> None:
    if document is not None and allowed is not None and document["fell"] > allowed:
        error = FinetuneError(
            f"the tuned model is {document['fell']:.1f} points below its base, --fail_below allows {allowed:g}"
        )
        error.is_shared = True
        raise error


def _bar(label: str, total: int, unit: str = " tokens") -> Any:
    """A progress bar on stderr, of rank 0 and its own share of the work."""
    from tqdm import tqdm

    return tqdm(total=total, desc=label, unit=unit, unit_scale=True, delay=2, disable=not is_rank_0())
