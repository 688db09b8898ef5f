"""The examination from its first question to its last: hosts, flags, data, memory, the ways between, a rehearsal."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.config.hardware import DetectedHardware, detect_hardware
from finetune.config.run_config import RankCounts, RunConfig
from finetune.dataset.prepare import PreparedData, check_dropped_share
from finetune.distributed import host_probe
from finetune.distributed.op_builder import operators_of
from finetune.launcher import ssh, staging
from finetune.models.loader import ModelInfo
from finetune.preflight import dry_run
from finetune.preflight.findings import DoctorReport
from finetune.preflight.host_checks import Answers, check_host, check_hosts, check_network, hardware_of
from finetune.preflight.machine_checks import check_machine, check_operators
from finetune.preflight.planned_run import PlannedRun, shared, world_of
from finetune.preflight.resource_checks import examine_resources
from finetune.training.data_setup import prepare_run_data
from finetune.utils.console import labelled
from finetune.utils.proc import ROOT

logger = logging.getLogger(__name__)

# Resolves the flags for the hardware and the ranks; see `train.resolve`.
Resolve = Callable[[DetectedHardware, RankCounts], tuple[RunConfig, ModelInfo]]


def examine_run(examination: DoctorReport, run: PlannedRun, resolve: Resolve) -> None:
    """All sections, in an order in which each has what it needs; what fails leaves out only what depends on it."""
    here = host_probe.collect_host_facts(_order(run))
    here["asked"] = [here["time"], here["time"]]
    remote = run.hosts_to_ask()
    if remote is not None and run.choice.stage:
        examination.attempt("hosts", lambda: _stage(run, here))
    slots = run.slots_by_host(here["gpus"])
    if remote is None:
        name = list(slots)[max(run.flags.node_rank, 0)]  # the same command is typed on every host
        answers: Answers = {name: here}
        check_host(examination, name, here, len(slots[name]))
        found = detect_hardware(use_cpu=bool(run.arguments.given("use_cpu")))
    else:
        logger.info(f"asking {len(slots)} hosts")
        answers = check_hosts(examination, slots, run.shell, shared(run), run.places)
        use_cpu = bool(run.arguments.given("use_cpu"))
        found = hardware_of(answers, use_cpu=use_cpu) if answers else detect_hardware(use_cpu=use_cpu)
    logger.info("examining flags and model")
    setup = examination.attempt("configuration", lambda: resolve(found, world_of(slots)))
    logger.info("reading the data")
    read = examination.attempt("data", lambda: _read(examination, run))
    check_machine(examination, here)
    if setup is not None:
        config, info = setup
        _note_configuration(examination, config, info, slots)
        if read is not None:
            logger.info("computing memory and disk")
            examine_resources(examination, config, info, *read, slots, answers)
        names = operators_of(config.deepspeed.config if config.deepspeed else None, use_cpu=config.hardware.use_cpu)
        with_code = [host for host in answers if answers[host]["code"]]
        if names and with_code:
            logger.info(f"building {', '.join(names)} where it is not built yet")
            check_operators(examination, names, with_code, run.shell, over_ssh=remote is not None)
    if remote is not None or (found.gpus and not run.flags.no_ssh):
        logger.info("connecting the ranks")
        check_network(
            examination, slots, run.shell, answers,
            flags=run.flags, backend="nccl" if found.gpus else "gloo", writes_environment=run.choice.write_env,
        )  # fmt: skip
    if run.choice.rehearse and not examination.status:
        examination.attempt("rehearsal", lambda: _rehearse(examination, run))


def _order(run: PlannedRun) -> dict[str, Any]:
    # What this machine has of the files is asked for only where others are to get it.
    words = shared(run) if run.choice.stage else []
    return {"folder": os.getcwd(), "code": str(ROOT / "finetune"), "words": words, **run.places.order()}


def _read(examination: DoctorReport, run: PlannedRun) -> tuple[Any, PreparedData]:
    tokenizer, chat_format, data = prepare_run_data(run.arguments.model, run.arguments.data)
    summary = data.summary
    lines = [*summary.lines(), f"format    {chat_format.name}"]
    examination.facts["data"] = {**summary.facts(), "fingerprint": data.fingerprint, "lines": lines}
    check_dropped_share(data, run.arguments.data.max_dropped_rows)
    return tokenizer, data


def _note_configuration(
    examination: DoctorReport, config: RunConfig, info: ModelInfo, slots: dict[str, list[int]]
) -> None:
    zero = config.deepspeed
    stage = "none (plain data parallel)" if zero is None else f"stage {zero.stage}" + (", offloaded" * zero.offloads)
    lines = {
        "ranks": f"{config.batch.world_size} on {len(slots)} host{'s' * (len(slots) > 1)} ("
        + ", ".join(f"{host}: {len(ids)}" for host, ids in slots.items())
        + f"), {'CPU, gloo' if config.hardware.use_cpu else 'GPU, nccl'}",
        "model": f"{info.name} ({info.config.model_type})",
        "ZeRO": stage,
        "precision": config.hardware.precision,
        "attention": f"{info.attention}, activation checkpointing "
        + ("on" if config.activation_checkpointing.enabled else "off"),
    }
    examination.facts["configuration"] = {
        "world_size": config.batch.world_size, "slots": slots, "backend": config.hardware.backend,
        "notes": list(config.notes),
        "precision": config.hardware.precision, "attention": info.attention,
        "deepspeed": zero.config if zero else None,
        "lines": [*labelled(lines), *(f"note: {note}" for note in config.notes)],
    }  # fmt: skip


def _stage(run: PlannedRun, here: dict[str, Any]) -> None:
    answers = ssh.probe_hosts(list(run.slots), run.shell, shared(run), run.places.order())
    wanted = staging.folders_to_stage(answers, here)
    if wanted:
        staging.send_folders(wanted, run.shell, Path.cwd())
    else:
        logger.info("every host has code, data and model already")


# ---- the rehearsal


def _rehearse(examination: DoctorReport, run: PlannedRun) -> None:
    chosen = run.arguments
    output = Path(chosen.training["output_dir"]).expanduser().absolute()
    folder = output.with_name(f".{output.name}.rehearsal-{secrets.token_hex(4)}")
    model = folder / "model"
    folder.mkdir(parents=True)
    remote = [host for host in run.hosts_to_ask() or () if not ssh.is_here(host)]
    try:
        heads = max(dry_run.HEADS, chosen.batch.sequence_parallel_size)
        parameters = dry_run.make_random_model(
            chosen.model.model_name_or_path, model,
            revision=chosen.model.model_revision, trust_remote_code=chosen.model.trusts_code(), heads=heads,
        )  # fmt: skip
        logger.info(f"rehearsing with a random model of {parameters:,} parameters")
        if remote:
            words = {"words": [str(model)]}
            answers = ssh.probe_hosts(remote, run.shell, words["words"])
            here = host_probe.collect_host_facts({**_order(run), **words})
            staging.send_folders(
                [one for one in staging.folders_to_stage(answers, here) if one.path == model], run.shell, folder
            )
        words = without_flags(run.words, ("--model_revision", "--overwrite_output_dir", "--save_strategy"))
        facts = dry_run.run_dry_run(run.rehearsal(words), model, folder / "output")
        lines = {
            "model": f"{parameters:,} random parameters of the same architecture",
            "trained": f"two steps, saved, verified: {facts['train_seconds']:.0f} s",
            "resumed": f"from the first checkpoint, same second step: {facts['resume_seconds']:.0f} s",
            "loaded": f"{facts['load_seconds']:.0f} s",
        }
        examination.facts["rehearsal"] = {**facts, "parameters": parameters, "lines": labelled(lines)}
    finally:
        host_probe.remove({"path": str(folder)})
        if remote:
            orders = {host: {"path": str(folder)} for host in remote}
            ssh.run_on_all_hosts(orders, run.shell, host_probe.remove, ssh.SECONDS_TO_PROBE)


def without_flags(words: list[str], names: tuple[str, ...]) -> list[str]:
    """The words without these flags and their values."""
    kept, skips = [], False
    for word in words:
        if word.startswith("--"):
            skips = word.partition("=")[0] in names
        if not skips:
            kept.append(word)
    return kept
