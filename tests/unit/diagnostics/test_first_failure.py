"""The first failure is told from the secondary ones that follow from it."""

from dataclasses import replace

import pytest

from finetune.diagnostics import Failure, find_first_failure, is_secondary
from tests.helpers.failure_samples import GPU_OUT_OF_MEMORY, NCCL_TIMEOUT, at, died, raised

PEER_FAILED = raised("RuntimeError: Connection reset by peer")


@pytest.mark.parametrize(
    "text",
    [
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:598] Connection closed by peer [10.0.0.5]:4711",
        "torch.distributed.DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed. Did the remote "
        "server shutdown or crash?",
        "torch.distributed.DistBackendError: NCCL error: remote process exited or there was a network error",
        "RuntimeError: NCCL communicator was aborted on rank 3.",
        "Work WorkNCCL(SeqNum=3, OpType=ALLREDUCE) was aborted",
        "torch.distributed.DistBackendError: [2] is setting up NCCL communicator, but recvValue failed on SocketImpl",
        "RuntimeError: Socket Timeout",
        "RuntimeError: Broken pipe",
        NCCL_TIMEOUT,
        "torch.distributed.DistStoreError: wait timeout after 8000ms, keys: /default_pg/0//1//cuda//0",
    ],
)
def test_messages_of_a_lost_peer_are_secondary(text):
    assert is_secondary(raised(text)) and is_secondary(raised("", traceback=f"Traceback:\n{text}"))


@pytest.mark.parametrize(
    "text",
    [
        GPU_OUT_OF_MEMORY,
        "RuntimeError: CUDA error: device-side assert triggered",
        "OSError: [Errno 28] No space left on device",
        "requests.exceptions.ConnectionError: ('Connection aborted.', ConnectionResetError(104, 'Connection reset by "
        "peer'))",
        "ConnectionRefusedError: [Errno 111] Connection refused",
        "torch.distributed.DistNetworkError: The client socket has timed out after 3000ms while trying to connect to "
        "(127.0.0.1, 29555).",
        "",
    ],
)
def test_other_messages_are_not_secondary(text):
    assert not is_secondary(raised(text))


def test_an_error_of_this_project_is_not_secondary_whatever_it_quotes():
    assert not is_secondary(raised("Connection reset by peer", "error"))


@pytest.mark.parametrize("kind", ["died", "launcher"])
def test_of_processes_that_were_ended_only_sigterm_is_secondary(kind):
    assert is_secondary(Failure(kind, signal=15)) and not is_secondary(Failure(kind, signal=9))


def test_the_first_failure_is_the_first_within_a_second_that_is_not_secondary():
    secondary = [at(1.0, PEER_FAILED, 0), at(1.1, died(15), 2)]
    cause = at(1.9, raised("ValueError: the moon is full"), 3)
    late = at(9.0, died(9), 4)
    assert find_first_failure([late, cause, *secondary]) == cause
    assert find_first_failure([late, *secondary]) == secondary[0]
    assert find_first_failure([late]) == late


def test_a_failure_without_a_date_counts_as_the_latest():
    late = at(9.0, died(9), 4)
    assert find_first_failure([replace(PEER_FAILED, when=""), late]) == late
    assert find_first_failure([PEER_FAILED, died(9)]) == died(9)


def test_no_failures_are_an_error():
    with pytest.raises(ValueError):
        find_first_failure([])


def test_dates_are_compared_with_their_offset_from_utc():
    cause = raised("ValueError: x", when="2026-11-24T10:00:01+08:00")
    assert find_first_failure([raised("ValueError: y", when="2026-11-24T02:00:59Z"), cause]) == cause


def test_of_ranks_that_hang_the_first_is_the_one_outside_a_collective():
    waits = Failure("stuck", traceback='  File "/x/torch/distributed/distributed_c10d.py", line 3252 in all_reduce')
    stopped = Failure("stuck", hints=["State: T (stopped)"])
    assert find_first_failure([at(1, waits, 0), at(1.2, stopped, 1), at(1.3, waits, 2)]) == at(1.2, stopped, 1)
