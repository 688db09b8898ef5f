"""Hosts that are not as they have to be: nothing starts, one message names the host and says what to do, and once that
is done the same command trains."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.helpers import hosts
from tests.helpers.host_runs import Cluster, another_version, cluster
from tests.helpers.paths import ROOT
from tests.helpers.rows import ROWS, write_rows

pytestmark = pytest.mark.hosts

SECONDS_TO_REFUSE = 30  # 5 on an idle machine
FLAGS = "--max_steps 2 --logging_steps 1 --save_strategy no --deepspeed zero2 --write_report False".split()


@pytest.fixture
def job(three_nodes, tmp_path, tiny_model) -> Iterator[Cluster]:
    with cluster(three_nodes, tmp_path, tiny_model) as made:
        yield made


def refused(job: Cluster, *named: str, status: int = 2, launcher: tuple[str, ...] = ()) -> str:
    """What a launch says that starts nothing, in one message."""
    run = job.start(*FLAGS, launcher=launcher)
    said = job.failed(run, *named, within=SECONDS_TO_REFUSE, status=status)
    assert said.count("error: ") == 1 and "The run failed" not in said and not job.output.exists(), said
    return said


def test_what_differs_on_one_host_is_named_with_both_values(job, tmp_path, three_nodes):
    """Data and a library on one host, the code on another; on a third everything is right."""
    first, second, third = three_nodes
    other = write_rows(tmp_path / "other.json", ROWS[:-1])
    module, code = tmp_path / "packing.py", ROOT / "finetune/dataset/packing.py"
    module.write_text(code.read_text() + "\n# another commit\n")
    with ExitStack() as faults:
        faults.enter_context(second.bound(other, job.data))
        faults.enter_context(another_version(second, "peft", "0.1.0", tmp_path))
        faults.enter_context(third.bound(module, code))
        said = refused(job, "3 faults", f"node1: {job.data} differs from that on node0", "nothing was started")
        assert "node1: peft 0.1.0, but" in said and f"node2: its {ROOT / 'finetune'} differs from that on node0" in said
        assert "  node0: " not in said


def test_a_host_that_cannot_be_reached_or_run_anything_is_named(job, tmp_path, three_nodes):
    """No sshd on one, no interpreter on another, and a name that nobody knows: all are said at once."""
    first, second, third = three_nodes
    empty = tmp_path / "empty"
    empty.mkdir()
    job.write_hostfile(*(f"{node.name} slots=1" for node in three_nodes), "node7 slots=1")
    with second.sshd("Port 2"), third.bound(empty, Path(sys.prefix)):
        said = refused(job, "3 faults", "nothing was started")
        assert "node1: `ssh node1` fails: ssh: connect to host node1 port 22: Connection refused" in said
        assert f"node2: {sys.executable} cannot be run there" in said
        assert "node7: `ssh node7` fails: ssh: Could not resolve hostname node7" in said


def test_a_key_that_is_refused_and_data_that_is_missing_are_named(job, tmp_path, three_nodes):
    first, second, third = three_nodes
    empty = tmp_path / "empty"
    empty.mkdir()
    with second.sshd("AuthorizedKeysFile none"), third.bound(empty, job.data.parent):
        said = refused(job, "2 faults", f"node2: {job.data} is missing", "nothing was started")
        assert "node1: `ssh node1` fails" in said and "Permission denied (publickey" in said


def test_an_interpreter_that_is_no_program_is_named(job, tmp_path, three_nodes):
    broken = tmp_path / "python"
    broken.write_bytes(b"")
    with three_nodes[2].bound(broken, Path(sys.executable).resolve()):
        refused(job, f"node2: {sys.executable} cannot be run there")


def test_hosts_whose_own_name_is_a_loopback_find_each_other(job, tmp_path, three_nodes):
    """As Debian writes /etc/hosts; gloo alone would announce that address."""
    (job.folder / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    with ExitStack() as names:
        for node in three_nodes:
            written = tmp_path / f"names-{node.name}"
            others = (node.folder / "names").read_text().replace(f"{node.address} {node.name}\n", "")
            written.write_text(f"127.0.1.1 {node.name}\n{others}")
            names.enter_context(node.bound(written, Path("/etc/hosts")))
        job.completed(job.start(*FLAGS))


def test_a_port_that_is_taken_is_named_before_anything_starts(job, three_nodes):
    with listening(three_nodes[0], 29877):
        refused(job, "node0: --master_port 29877 is taken", launcher=("--master_port=29877",))


@contextmanager
def listening(host: hosts.Host, port: int) -> Iterator[None]:
    """Something else has the port, as long as the host runs it: it counts as the host's own."""
    serve = f"import socket; s = socket.create_server(('', {port})); print('up', flush=True)\nwhile True: s.accept()"
    words = host.command([sys.executable, "-c", serve], Path("/"))
    other, idle = subprocess.Popen(words, stdout=subprocess.PIPE, text=True), set(host.own)
    try:
        assert other.stdout.readline() == "up\n"
        host.own.update(host.processes())
        yield
    finally:
        host.own.intersection_update(idle)
        host.end_processes()
        other.communicate()


def test_a_bare_deepspeed_whose_port_is_taken_names_it(job, three_nodes):
    job.write_hostfile("node0 slots=1", "node1 slots=1")
    with listening(three_nodes[0], 29500):
        job.failed(job.start_deepspeed(*FLAGS), "on node0", "EADDRINUSE", "--master_port", within=100)


def test_a_bare_deepspeed_whose_hosts_have_other_data_ends_on_all_with_one_error(job, tmp_path, three_nodes):
    """Nobody asked the hosts before: the ranks find out, before a weight is loaded; then the same command trains."""
    other = write_rows(tmp_path / "other.json", ROWS[:-1])
    with three_nodes[2].bound(other, job.data):
        said = job.failed(job.start_deepspeed(*FLAGS), within=100, status=3)
        assert said.count(" error: ") + said.count(" error (") == 1 and "The run failed" not in said, said
        assert "the data differs: node0, node1 have " in said and ", node2 has " in said
        assert f"copy {job.data} from node0 to node2" in said and not job.output.exists()

    job.completed(job.start_deepspeed(*FLAGS))
    assert json.loads((job.output / "run.json").read_text())["world_size"] == 3
