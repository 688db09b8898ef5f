"""All checks of the doctor in order: hosts, flags, data, memory, operators, network, rehearsal."""

import json
import logging
import os
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from finetune.config import Arguments
from finetune.config.adapter_arguments import KINDS_OF_METHODS
from finetune.config.deepspeed_optimizers import operators_of
from finetune.config.hardware import DetectedHardware, detect_hardware, hardware_of
from finetune.config.run_config import RankCounts, RunConfig
from finetune.config.saved_adapter import read_adapter_config
from finetune.dataset.prepare import PreparedData
from finetune.distributed import host_probe
from finetune.launcher import ssh, staging
from finetune.models.attention import unsupported_config_reason
from finetune.models.loader import ModelInfo
from finetune.preflight import dry_run
from finetune.preflight.doctor_report import DoctorReport
from finetune.preflight.host_checks import (
    Answers,
    check_host,
    check_hosts,
    check_machine,
    check_network,
    check_operators,
    with_gpus_of,
)
from finetune.preflight.planned_run import PlannedRun
from finetune.preflight.resource_checks import check_resources, forecast_batches, free_space, note_batches, run_spec
from finetune.training.data_setup import check_data, prepare_run_data
from finetune.training.model_checks import check_against_data
from finetune.utils.console import labelled
from finetune.utils.options import without_flags
from finetune.utils.proc import ROOT

logger = logging.getLogger(__name__)

# Resolves the flags for the hardware and the ranks; see `train.resolve`.
Resolve = Callable[[Arguments, DetectedHardware, RankCounts], tuple[RunConfig, ModelInfo]]


def examine_run(report: DoctorReport, run: PlannedRun, resolve: Resolve) -> None:
    """Run all checks. A check that fails leaves out only those that need its result."""
    here = host_probe.collect_host_facts(_local_order(run))
    here["asked"] = [here["time"], here["time"]]
    remote = run.hosts_over_ssh()
    if remote is not None and run.choice.stage:
        report.attempt("hosts", lambda: _stage(run, list(remote), here))
    slots = run.slots_by_host(len(detect_hardware().gpus))  # as the launcher counts them, also for ranks on the CPU
    hardware = detect_hardware(use_cpu=run.use_cpu)
    if remote is None:
        name = list(slots)[max(run.flags.node_rank, 0)]  # the same command is typed on every host
        answers: Answers = {name: with_gpus_of(slots[name], here)}
        check_host(report, name, answers[name], len(slots[name]))
    else:
        logger.info(f"asking {len(slots)} hosts")
        answers = check_hosts(report, run, slots)
        hardware = hardware_of(answers.values(), use_cpu=run.use_cpu) if answers else hardware
    logger.info("checking flags and model")
    counts = [len(ids) for ids in slots.values()]
    ranks = RankCounts(sum(counts), max(counts))
    resolved = report.attempt("configuration", lambda: resolve(run.arguments, hardware, ranks))
    logger.info("reading the data")
    read = report.attempt("data", lambda: _read(report, run))
    check_machine(report, here)
    if resolved is not None:
        config, info = resolved
        fitted = read and report.attempt("configuration", lambda: check_against_data(config, info, *read))
        config = fitted or config
        _note_configuration(report, slots, info, config)
        if fitted and read:
            logger.info("computing memory and disk")
            tokenizer, data = read
            obstacle = unsupported_config_reason(info.config, data.longest)
            forecast = partial(forecast_batches, config.batch, config.schedule, data)
            batches = report.attempt("configuration", lambda: forecast(obstacle=obstacle))
            if batches is not None:
                note_batches(report, config.batch, batches)
                planned = run_spec(config, batches, ranks_on_host=max(map(len, slots.values())))
                free = free_space(config.hardware.use_cpu, answers)
                check_resources(report, planned, batches.first, free, info, tokenizer, config.adapter)
        names = operators_of(config.deepspeed.config if config.deepspeed else None, use_cpu=config.hardware.use_cpu)
        with_code = [host for host in answers if answers[host]["code"]]
        if names and with_code:
            logger.info(f"building {', '.join(names)} where it is not built yet")
            check_operators(report, names, with_code, None if remote is None else run.shell)
    if remote is not None or (hardware.gpus and not run.flags.no_ssh):
        logger.info("connecting the ranks")
        check_network(report, run, slots, answers, "nccl" if hardware.gpus else "gloo")
    if run.choice.rehearse and not report.status:
        report.attempt("rehearsal", lambda: _rehearse(report, run))


def _local_order(run: PlannedRun, words: list[str] | None = None) -> dict[str, Any]:
    """Return what this machine is asked for; about files only where others are to get them."""
    words = words or (run.shared_words if run.choice.stage else [])
    return {"folder": os.getcwd(), "code": str(ROOT / "finetune"), "words": words, **run.probe_order()}


def _read(report: DoctorReport, run: PlannedRun) -> tuple[Any, PreparedData]:
    tokenizer, chat_format, data = prepare_run_data(run.arguments.model, run.arguments.data)
    summary = data.summary
    lines = [*summary.lines(), f"format    {chat_format.name}"]
    report.facts["data"] = {**summary.facts(), "fingerprint": data.fingerprint, "lines": lines}
    check_data(data, run.arguments.data)
    return tokenizer, data


def _note_configuration(report: DoctorReport, slots: dict[str, list[int]], info: ModelInfo, config: RunConfig) -> None:
    hardware, zero = config.hardware, config.deepspeed
    checkpointing = "on" if config.activation_checkpointing.enabled else "off"
    ranks, hosts = sum(map(len, slots.values())), f"{len(slots)} host{'s' * (len(slots) > 1)}"
    by_host = ", ".join(f"{host}: {len(ids)}" for host, ids in slots.items())
    lines = {
        "ranks": f"{ranks} on {hosts} ({by_host}), {'CPU, gloo' if hardware.use_cpu else 'GPU, nccl'}",
        "model": f"{info.name} ({info.config.model_type})",
        "ZeRO": f"stage {zero.stage}" + (", offloaded" * zero.offloads) if zero else "none (plain data parallel)",
        "precision": hardware.precision,
        "attention": f"{info.attention}, activation checkpointing {checkpointing}",
    }
    report.facts["configuration"] = {
        "world_size": ranks,
        "slots": slots,
        "backend": hardware.backend,
        "notes": list(config.notes),
        "precision": hardware.precision,
        "attention": info.attention,
        "deepspeed": zero.config if zero else None,
        "lines": [*labelled(lines), *(f"note: {note}" for note in config.notes)],
    }


def _stage(run: PlannedRun, hosts: list[str], here: dict[str, Any]) -> None:
    answers = ssh.probe_hosts(hosts, run.shell, run.shared_words, run.probe_order())
    wanted = staging.folders_to_stage(answers, here)
    if wanted:
        staging.send_folders(wanted, run.shell, Path.cwd())
    else:
        logger.info("every host has code, data and model already")


# ---- the rehearsal


def _rehearse(report: DoctorReport, run: PlannedRun) -> None:
    base, output = run.arguments.model, run.arguments.output_dir.absolute()
    folder = output.with_name(f".{output.name}.rehearsal-{secrets.token_hex(4)}")
    model = folder / "model"
    folder.mkdir(parents=True)
    remote = [host for host in run.hosts_over_ssh() or () if not ssh.is_here(host)]
    try:
        trusts_code = base.trusts_code()
        parameters = dry_run.make_random_model(
            base.model_name_or_path,
            model,
            revision=base.model_revision,
            trust_remote_code=trusts_code,
            heads=max(dry_run.HEADS, run.arguments.batch.sequence_parallel_size),
        )
        logger.info(f"rehearsing with a random model of {parameters:,} parameters")
        if remote:
            answers = ssh.probe_hosts(remote, run.shell, [str(model)])
            here = host_probe.collect_host_facts(_local_order(run, [str(model)]))
            wanted = [staged for staged in staging.folders_to_stage(answers, here) if staged.path == model]
            staging.send_folders(wanted, run.shell, folder)
        words = without_flags(run.words, ("--model_revision", "--overwrite_output_dir", "--save_strategy"))
        if adapter := base.adapter_name_or_path:  # its weights do not fit a small model: a new one of its kind
            saved = read_adapter_config(Path(adapter))
            kind = KINDS_OF_METHODS.get(saved["peft_type"])
            words += [
                "--adapter_name_or_path=",
                *(["--adapter", kind] if kind else [f"--adapter_config={json.dumps(saved)}"]),
            ]
        facts = dry_run.run_dry_run(run.rehearsal(words), model, folder / "output", trusts_code=trusts_code)
        lines = {
            "model": f"{parameters:,} random parameters of the same architecture",
            "trained": f"two steps, saved, verified: {facts['train_seconds']:.0f} s",
            "resumed": f"from the first checkpoint, same second step: {facts['resume_seconds']:.0f} s",
            "loaded": f"{facts['load_seconds']:.0f} s",
        }
        report.facts["rehearsal"] = {**facts, "parameters": parameters, "lines": labelled(lines)}
    finally:
        order = {"path": str(folder)}
        host_probe.remove(order)
        if remote:
            ssh.run_on_all_hosts(dict.fromkeys(remote, order), run.shell, host_probe.remove, ssh.SECONDS_TO_PROBE)
