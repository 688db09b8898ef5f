"""Of builds, versions, configs, and of processes that said little: the title of a cause, and failures that have it."""

from __future__ import annotations

from failure_texts.made import NCCL, WATCHDOG, died, said
from finetune.diagnostics import Failure

OF_SOFTWARE = {
    "CUDA of this host and CUDA of torch differ": [
        said("deepspeed.ops.op_builder.builder.CUDAMismatchException: >- DeepSpeed Op Builder: Installed CUDA "
             "version "
             "11.8 does not match the version torch was compiled with 12.1, unable to compile cuda/cpp extensions "
             "without a matching cuda version."),
        said("RuntimeError: \nThe detected CUDA version (11.8) mismatches the version that was used to compile\n"
             "PyTorch (12.1). Please make sure to use the same CUDA versions."),
    ],
    "the CUDA toolkit is missing": [
        said("deepspeed.ops.op_builder.builder.MissingCUDAException: CUDA_HOME does not exist, unable to "
             "compile CUDA "
             "op(s)"),
        said("OSError: CUDA_HOME environment variable is not set. Please set it to your CUDA install root."),
    ],
    "ninja is missing": [
        said("RuntimeError: Ninja is required to load C++ extensions (pip install ninja to get it)"),
        said("RuntimeError: Unable to JIT load the cpu_adam op due to ninja not being installed."),
    ],
    "libaio is missing": [
        said("RuntimeError: Unable to JIT load the async_io op due to it not being compatible due to "
             "hardware/software issue. None"),
    ],
    "the compiler or Python's headers are missing": [
        said("fatal error: Python.h: No such file or directory\ncompilation terminated."),
        said("/bin/sh: 1: c++: not found\nninja: build stopped: subcommand failed."),
        said("FileNotFoundError: [Errno 2] No such file or directory: 'g++'"),
    ],
    "a C++ library is older than what was compiled": [
        said("ImportError: /lib/x86_64-linux-gnu/libstdc++.so.6: version `GLIBCXX_3.4.30' not found (required by "
             "/root/.cache/torch_extensions/cpu_adam/cpu_adam.so)"),
    ],
    "flash-attn does not fit this torch": [
        said("ImportError: /venv/flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so: undefined symbol: "
             "_ZN3c105ErrorC2ENS_14SourceLocationESs"),
    ],
    "flash-attn is missing": [
        said("ImportError: FlashAttention2 has been toggled on, but it cannot be used due to the following "
             "error: the "
             "package flash_attn seems to be not installed."),
        said("ModuleNotFoundError: No module named 'flash_attn'"),
    ],
    "compiled code and libraries do not fit": [
        said("OSError: libcudart.so.12: cannot open shared object file: No such file or directory"),
        said("ImportError: /venv/torch/lib/libtorch_cuda.so: undefined symbol: ncclCommRegister"),
    ],
    "an operator of DeepSpeed was not built": [
        said("AttributeError: 'DeepSpeedCPUAdam' object has no attribute 'ds_opt_adam'"),
        said("RuntimeError: Error building extension 'cpu_adam'"),
    ],
    "batch sizes contradict each other": [
        said("AssertionError: Check batch related parameters. train_batch_size is not equal to "
             "micro_batch_per_gpu * "
             "gradient_acc_step * world_size 64 != 4 * 4 * 1"),
    ],
    "DeepSpeed config and command line differ": [
        said("ValueError: Please correct the following DeepSpeed config values that mismatch TrainingArguments "
             "values:"
             "\n- ds train_micro_batch_size_per_gpu=8 vs hf per_device_train_batch_size=4"),
    ],
    "a buffer for NVMe is too small": [said("AssertionError: More elements 525336576 than buffer size 100000000")],
    "stage 3 lost track of the parameters": [
        said("RuntimeError: still have inflight params [{'id': 12, 'status': 'INFLIGHT'}]"),
    ],
    "checkpointed activations were recomputed in another shape": [
        said("torch.utils.checkpoint.CheckpointError: torch.utils.checkpoint: Recomputed values for the following "
             "tensors have different metadata than during the forward pass.\ntensor at position 4:\nsaved "
             "metadata: "
             "{'shape': torch.Size([1024])}\nrecomputed metadata: {'shape': torch.Size([8])}"),
    ],
    "no gradient reaches the trained parameters": [
        said("RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn"),
    ],
    "two precisions meet": [
        said("RuntimeError: mat1 and mat2 must have the same dtype, but got Float and BFloat16"),
        said("RuntimeError: expected scalar type Float but found BFloat16"),
    ],
    "a library has renamed an argument": [
        said("TypeError: Trainer.__init__() got an unexpected keyword argument 'tokenizer'"),
    ],
    "this transformers does not know the model": [
        said("ValueError: The checkpoint you are trying to load has model type `nosuch` but Transformers does not "
             "recognize this architecture."),
    ],
    "a package for the tokenizer is missing": [
        said("ValueError: Couldn't instantiate the backend tokenizer from one of: \n(1) a `tokenizers` library "
             "serialization file"),
    ],
    "a package is missing on this host": [said("ModuleNotFoundError: No module named 'deepspeed'")],
    "packages do not belong together": [
        said("ImportError: cannot import name 'EncoderDecoderCache' from 'transformers' (/venv/transformers)"),
    ],
    "ssh does not know the host": [
        said("node1: Host key verification failed.\npdsh@login: node1: ssh exited with exit code 255", "launcher"),
    ],
    "pdsh is missing": [said("RuntimeError: launcher 'pdsh' not installed.", "launcher")],
    "a host cannot be reached over ssh": [
        said("RuntimeError: Using hostfile at hosts but host=node0 was not reachable via ssh. If you are "
             "running with "
             "a single node please remove hosts or setup passwordless ssh.", "launcher"),
        said("node1: ssh: connect to host node1 port 22: Connection refused", "launcher"),
    ],
    "the hostfile is not as the launcher reads it": [
        said("ValueError: Hostfile contains a bad entry: node1 slots = 8, unable to proceed with launching",
             "launcher"),
    ],
    "hosts or slots were named that the hostfile does not have": [
        said("ValueError: No slot '2' specified on host 'localhost'", "launcher"),
    ],
    ".deepspeed_env has a line that is no NAME=value": [
        said("ValueError: not enough values to unpack (expected 2, got 1)", "launcher"),
    ],
    "folder or Python are missing on another host": [
        said("node1: bash: line 1: cd: /home/me/finetune: No such file or directory", "launcher"),
        said("node1: bash: line 1: /home/me/finetune/.venv/bin/python: No such file or directory", "launcher"),
    ],
    "the port is taken": [
        said("torch.distributed.DistNetworkError: The server socket has failed to listen on any local network "
             "address. port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use"),
    ],
    "gloo announced an address that other hosts cannot reach": [
        said("RuntimeError: Gloo connectFullMesh failed with "
             "[../third_party/gloo/gloo/transport/tcp/pair.cc:144] no "
             "error"),
    ],
    "an address is not known": [
        said("torch.distributed.DistNetworkError: The IPv4 network addresses of (node9, 29500) cannot be "
             "retrieved "
             "(gai error: -2 - Name or service not known)."),
    ],
    "there is no way to the other host": [said("OSError: [Errno 113] No route to host")],
    "the ranks did not meet": [
        said("torch.distributed.DistNetworkError: The client socket has timed out after 3000ms while trying to "
             "connect "
             "to (127.0.0.1, 29555)."),
        said("torch.distributed.DistStoreError: Timed out after 601 seconds waiting for clients. 8/16 clients "
             "joined."),
    ],
    "connections are refused": [said("ConnectionRefusedError: [Errno 111] Connection refused")],
    "ranks waited too long for one that prepares data or a model": [said(WATCHDOG, phase="data")],
    "InfiniBand does not carry the traffic": [
        said(NCCL + "remote process exited or there was a network error\nNET/IB : Got completion from peer "
             "10.0.0.2 "
             "with status=12 opcode=0 len=0 vendor err 129"),
    ],
    "NCCL was used in a wrong way": [said(NCCL + "invalid usage, ncclInvalidUsage: This usually reflects "
    "invalid usage")],
    "NCCL could not use the network or shared memory": [
        said(NCCL + "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.20.5"),
    ],
    "NCCL met an error of CUDA": [
        said(NCCL + "unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.20.5"),
    ],
    "a rank did not come to what the others do together": [
        said(WATCHDOG, phase="step", step=12),
        said("RuntimeError: [/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] "
             "Timed out "
             "waiting 8000ms for recv operation to complete", phase="step"),
    ],
    "another rank ended first": [
        said("RuntimeError: [/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error "
             "[127.0.0.1]:43920: Connection reset by peer."),
        said(NCCL + "remote process exited or there was a network error, NCCL version 2.20.5"),
        said("BrokenPipeError: [Errno 32] Broken pipe"),
    ],
    "probably the host ran out of memory while the model was loaded": [died(9, phase="model")],
    "killed from outside, often because the host ran out of memory": [
        died(9, phase="step", step=12),
        Failure("died", status=247),
        Failure("died", status=137),
        Failure("died", status=-9),
        died(9, hints=["oom_kill 0"]),
    ],
    "the launcher is gone": [
        said("deepspeed.launcher.launch (process 7) has died, and its ranks with it", "launcher")
    ],
    "killed from outside, or crashed in compiled code": [said("rank 1 on a ended without a word", "died")],
    "the launcher was killed": [Failure("launcher", signal=9), Failure("launcher", status=-9)],
    "ended by whoever started it": [died(15), died(2), Failure("stopped", signal=15)],
    "the run was asked to stop": [Failure("stopped", status=75)],
    "the processor does not know an instruction": [died(4)],
    "memory behind a file was lost": [died(7), Failure("died", status=-7)],
    "a crash inside compiled code": [died(11), Failure("died", status=139)],
    "a library gave up": [died(6)],
    "a process ended too early": [Failure("died", status=0)],
    "some ranks never arrived": [Failure("missing", ranks=[4, 5, 6, 7], hosts=["node1"], phase="meeting")],
    "a host was lost": [Failure("lost", host="node1", phase="step", step=12)],
    "preparing data took longer than a rank may wait": [Failure("stuck", phase="data", seconds=1800)],
    "a rank waits at the meeting for others": [Failure("stuck", phase="meeting", seconds=1800)],
    "loading the model takes too long": [Failure("stuck", phase="model", seconds=1800)],
    "a save does not end": [Failure("stuck", phase="save", seconds=1800)],
    "one rank is behind and the others wait for it": [Failure("stuck", phase="step", step=12, seconds=600)],
}  # fmt: skip
