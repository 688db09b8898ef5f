"""`finetune doctor` beside three real hosts: all that is wrong with any of them at once, in seconds, before a run."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers import hosts
from tests.helpers.host_runs import Cluster, another_version, cluster
from tests.helpers.rows import ROWS, write_rows

pytestmark = pytest.mark.hosts

FLAGS = "--max_steps 2 --logging_steps 1 --save_strategy no --deepspeed zero2 --write_report False".split()
SECONDS = 60  # 15 on an idle machine


@pytest.fixture
def job(three_nodes, tmp_path, tiny_model) -> Iterator[Cluster]:
    with cluster(three_nodes, tmp_path, tiny_model) as made:
        yield made


def by_host(found: dict) -> dict[str | None, str]:
    """Host -> all that would end the run there, in one text."""
    texts: dict[str | None, str] = {}
    for one in found["findings"]:
        if one["status"]:
            texts[one["host"]] = f"{texts.get(one['host'], '')}{one['section']}: {one['text']}\n"
    return texts


def test_hosts_that_are_alike_are_joined_measured_and_written_down(job, three_nodes):
    environment = job.folder / ".deepspeed_env"
    before = "# mine\n\nOMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\nHF_HUB_OFFLINE=1\nGLOO_SOCKET_IFNAME=gone0\n"
    environment.write_text(before)

    status, found = job.doctor(*FLAGS)
    assert status == 2
    assert {host: "GLOO_SOCKET_IFNAME=gone0" in text for host, text in by_host(found).items()} == {
        node.name: True for node in three_nodes
    } | ({None: False} if None in by_host(found) else {})

    status, found = job.doctor(*FLAGS, "--write_env")

    assert status == 0, found["findings"]
    lines = environment.read_text().splitlines()
    assert {"OMP_NUM_THREADS=1", "GLOO_SOCKET_IFNAME=eth0", "NCCL_SOCKET_IFNAME=eth0"} <= set(lines)
    assert all("=" in line and not line.startswith("#") for line in lines)  # what bare deepspeed can read
    assert (job.folder / ".deepspeed_env.before-1").read_text() == before
    network = found["network"]
    assert (network["address"], set(network["interfaces"].values())) == ("10.77.0.10", {"eth0"})
    assert network["all_reduce"]["bytes_per_second"] > 1e6 and len(network["all_reduce"]["ranks"]) == 3
    assert list(found["hosts"]) == ["node0", "node1", "node2"] and found["configuration"]["world_size"] == 3
    job.completed(job.start(*FLAGS))
    again, found = job.doctor("--full", *FLAGS, "--overwrite_output_dir", "True")
    assert again == 0, found["findings"]


def test_all_that_is_wrong_is_named_by_host_at_once(job, tmp_path, three_nodes):
    first, second, third = three_nodes
    other = write_rows(tmp_path / "other.json", ROWS[:-1])
    job.write_hostfile(
        "node0 slots=1", "node1 slots=1", "node2 slots=1", "nowhere slots=1", f"node1{hosts.ALIAS} slots=1"
    )
    with ExitStack() as faults:
        faults.enter_context(second.bound(other, job.data))
        faults.enter_context(another_version(second, "peft", "0.1.0", tmp_path))
        faults.enter_context(second.disk(Path("/dev/shm"), "1m"))
        faults.enter_context(third.sshd("Port 2"))
        began = time.monotonic()

        status, found = job.doctor(*FLAGS)

        assert time.monotonic() - began < SECONDS
    assert status == 2
    said = by_host(found)
    assert f"{job.data} differs from that on node0" in said["node1"] and "peft 0.1.0" in said["node1"]
    assert "Connection refused" in said["node2"] and "`ssh node2` fails" in said["node2"]
    assert "`ssh nowhere` fails" in said["nowhere"] and "resolve" in said["nowhere"]
    assert "is the same machine as node1" in said[f"node1{hosts.ALIAS}"]
    assert "node0" not in said
    assert any("/dev/shm" in one["text"] and one["host"] == "node1" for one in found["findings"])


def test_a_port_that_a_firewall_closes_and_a_disk_that_is_small_are_found(job, tmp_path, three_nodes):
    first, second, _ = three_nodes
    second.run("ip", "route", "add", "prohibit", "10.77.0.10/32")
    try:
        status, found = job.doctor(*FLAGS)
        assert status == 2 and "node1" in by_host(found), found["findings"]
    finally:
        second.run("ip", "route", "del", "prohibit", "10.77.0.10/32")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with second.disk(scratch, "4m"):
        flags = ("--output_dir", scratch / "output", *FLAGS, "--save_strategy", "epoch", "--deepspeed", "zero3")
        status, found = job.doctor(*flags)
    assert status == 6, found["findings"]
    assert list(by_host(found)) == ["node1"] and "the disk of --output_dir has 4 MiB free" in by_host(found)["node1"]


def test_what_hosts_lack_is_staged_and_what_differs_is_kept_aside(job, tmp_path, three_nodes):
    _, second, third = three_nodes
    other = write_rows(tmp_path / "other.json", ROWS[:2])
    with second.disk(job.data.parent), third.disk(job.data.parent):
        third.run("cp", other, job.data)

        status, found = job.doctor(*FLAGS)
        said = by_host(found)
        assert status == 2 and "is missing" in said["node1"] and "differs" in said["node2"]
        status, found = job.doctor(*FLAGS, "--stage")

        assert status == 0, found["findings"]
        for node in (second, third):
            assert node.run("cat", job.data) == job.data.read_text()
        kept = third.run("sh", "-c", f"cat {job.data.parent}/.replaced-*/{job.data.name}")
        assert kept == other.read_text()


def test_a_rehearsal_runs_the_whole_chain_on_hosts_without_a_shared_disk(job, tmp_path, three_nodes):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with ExitStack() as disks:
        for node in three_nodes:
            disks.enter_context(node.disk(scratch, "1g"))
        flags = ("--output_dir", scratch / "output", "--deepspeed", "zero3", "--per_device_train_batch_size", "1")
        status, found = job.doctor(*flags, "--rehearse")
        assert status == 0, found["findings"]
        assert len(found["rehearsal"]["losses"]) == 2
        for node in three_nodes:
            assert node.run("ls", "-A", scratch) == ""


def write_hollow_weights(path: Path, config: LlamaConfig) -> None:
    """A safetensors file in bf16 that takes no disk: behind its header nothing was written."""
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


def test_what_gpus_must_hold_is_told_from_a_machine_without_one(job, tmp_path, three_nodes, smol_tokenizer):
    """`nvidia-smi` alone is a stand-in, of GPUs of 8 GiB; the weights are a header and a hole."""
    model = tmp_path / "1b"
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=2_048, intermediate_size=5_632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(model)
    write_hollow_weights(model / "model.safetensors", config)
    smol_tokenizer.save_pretrained(model)
    program = tmp_path / "bin/nvidia-smi"
    program.parent.mkdir()
    line = "NVIDIA GeForce RTX 3070, 8192, 300, 8.6, 570.12"
    program.write_text(f'#!/bin/sh\n[ "$1" = -L ] && echo "GPU 0: NVIDIA GeForce RTX 3070" || echo "{line}"\n')
    program.chmod(0o755)
    flags = ("--model_name_or_path", model, *FLAGS, "--bf16", "True", "--deepspeed", "zero3")
    with ExitStack() as hosts_with_gpus:
        for node in three_nodes[1:]:
            hosts_with_gpus.enter_context(node.sshd(f"SetEnv PATH={program.parent}:/usr/local/bin:/usr/bin:/bin"))
        job.write_hostfile("node1 slots=1", "node2 slots=1")

        status, found = job.doctor(*flags)

    assert found["configuration"]["backend"] == "nccl" and found["configuration"]["precision"] == "bf16"
    memory = found["memory"]
    assert memory["parameters"] == 1_170_302_976 and memory["device"]["capacity"] == 8_192 << 20
    assert (
        memory["device"]["total"] > 16 * memory["parameters"] / 2
    )  # bytes a parameter, over two ranks: the ZeRO paper
    assert memory["fits"] is False and status != 0
    assert any(one["section"] == "memory" and one["status"] == 1 for one in found["findings"])
    assert memory["changes"] and all(one["device"] <= 8_192 << 20 for one in memory["changes"])
