"""How the doctor counts the ranks of this machine."""

from types import SimpleNamespace

import pytest

from finetune.config.hardware import DetectedHardware, Gpu
from finetune.preflight import DoctorReport, examination


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
