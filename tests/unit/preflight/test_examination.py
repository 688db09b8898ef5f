"""How the doctor counts the ranks of this machine."""

from types import SimpleNamespace

import pytest

from finetune.config.hardware import DetectedHardware, Gpu, hardware_of
from finetune.distributed import host_probe
from finetune.preflight import DoctorReport, examination
from finetune.preflight.host_checks import with_gpus_of
from finetune.preflight.resource_checks import free_space


def test_only_the_gpus_of_the_slots_count():
    sizes = [80, 80, 24, 24]
    gpus = [{"name": "A", "capability": "8.0", "memory": size << 30, "used": size << 29} for size in sizes]
    facts = {"gpus": 4, "gpu_facts": gpus, "versions": {}, "memory": {"available": 1}, "space": {"output": {"free": 1}}}
    first = with_gpus_of([0, 1], facts)
    assert free_space(use_cpu=False, answers={"h": first}).device == 80 << 30
    assert len(hardware_of([first], use_cpu=False).gpus) == 2
    unlike = {**facts, "gpu_facts": [{**gpus[0], "name": "B", "capability": "7.0"}, *gpus[1:]]}
    assert hardware_of([with_gpus_of([2, 3], unlike)], use_cpu=False).weakest == Gpu("B", (7, 0))


def test_what_nvidia_smi_does_not_report_of_a_gpu_is_no_fault_of_it(monkeypatch):
    lines = ["NVIDIA GB10, [N/A], [N/A], 12.1, 580.95", "GRID V100S, 32768, [Not Supported], [N/A], 550.54"]
    monkeypatch.setattr(host_probe, "_nvidia_smi", lambda *_: lines)
    facts = {"gpus": 2, "gpu_facts": host_probe.gpu_facts(), "versions": {}}
    answer = {**facts, "memory": {"available": 1}, "space": {"output": {"free": 1}}}

    assert free_space(use_cpu=False, answers={"h": answer}).device is None
    assert hardware_of([facts], use_cpu=False).gpus == (Gpu("NVIDIA GB10", (12, 1)), Gpu("GRID V100S", (8, 0)))


class Counted(Exception):
    """The number of GPUs that slots were asked for."""


@pytest.mark.parametrize("use_cpu", [False, True])
def test_there_is_a_rank_for_each_gpu_that_the_launcher_sees(monkeypatch, use_cpu):
    """nvidia-smi lists those that CUDA_VISIBLE_DEVICES hides, and none of AMD's."""

    def slots_by_host(gpus: int) -> None:
        raise Counted(gpus)

    def detect(use_cpu: bool = False) -> DetectedHardware:
        return DetectedHardware(gpus=() if use_cpu else (Gpu("H100", (9, 0)),) * 2)

    run = SimpleNamespace(use_cpu=use_cpu, hosts_over_ssh=lambda: None, slots_by_host=slots_by_host)
    monkeypatch.setattr(examination, "_local_order", lambda run: {})
    monkeypatch.setattr(examination.host_probe, "collect_host_facts", lambda order: {"time": 0.0, "gpus": 8})
    monkeypatch.setattr(examination, "detect_hardware", detect)
    with pytest.raises(Counted, match="^2$"):
        examination.examine_run(DoctorReport(), run, lambda *values: None)
