"""Failures with messages that libraries and systems really print, by the code of their cause."""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from finetune.diagnostics import KINDS, PHASES, Failure

NCCL = "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:2021, "
GLOO = "RuntimeError: [/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/"
GPU_OUT_OF_MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.15 GiB "
    "of which 1.06 GiB is free. Of the allocated memory 75.00 GiB is allocated by PyTorch, and 1.33 GiB is reserved."
)
NCCL_TIMEOUT = (
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE, NumelIn=1, "
    "NumelOut=1, Timeout(ms)=1800000) ran for 1800453 milliseconds before timing out."
)


def raised(error: str, kind: str = "exception", **others: Any) -> Failure:
    """Return the failure of a rank that raised an exception with this message."""
    return Failure(kind, error, **others)


def died(signal: int, **others: Any) -> Failure:
    """Return the failure of a process that a signal ended."""
    return Failure("died", signal=signal, **others)


def at(second: float, failure: Failure, rank: int | None = None) -> Failure:
    """Return the failure with a date, of a rank."""
    return replace(failure, when=f"2026-11-24T10:00:{second:06.3f}+08:00", rank=rank)


UTF8_TEXT = st.text(st.characters(codec="utf-8"), max_size=200)
FAILURES = st.builds(
    Failure,
    kind=st.sampled_from(KINDS),
    error=st.text(max_size=300),
    run=UTF8_TEXT,
    when=st.datetimes().map(lambda when: when.isoformat() + "+08:00") | UTF8_TEXT,
    rank=st.none() | st.integers(0, 4096),
    host=st.none() | st.text(max_size=20),
    ranks=st.lists(st.integers(0, 4096), max_size=20),
    hosts=st.lists(st.text(max_size=20), max_size=5),
    status=st.integers(-64, 255),
    signal=st.none() | st.integers(-1, 70),
    phase=st.sampled_from(["", *PHASES]),
    step=st.none() | st.integers(0, 2**62),
    seconds=st.none() | st.floats(),
    traceback=st.text(max_size=300),
    hints=st.lists(st.text(max_size=100), max_size=4),
    checkpoint=UTF8_TEXT,
    also=st.lists(st.text(max_size=100), max_size=10),
)

SAMPLES = {
    "process-stopped": [Failure("stuck", phase="step", seconds=300, hints=["State: T (stopped)"])],
    "disk-not-responding": [
        Failure("stuck", phase="save", hints=["State: D (disk sleep)"]),
        Failure("stuck", phase="data", hints=["State: D (disk sleep)"]),
    ],
    "operator-build-lock": [
        Failure("stuck", phase="model", traceback='  File "/x/torch/utils/file_baton.py", line 50 in wait')
    ],
    "shared-memory-full": [
        raised("RuntimeError: DataLoader worker (pid 812) is killed by signal: Bus error. It is possible that "
               "dataloader's workers are out of shared memory. Please try to raise your shared memory limit."),
        raised("Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm)."),
        raised(f"{NCCL}unhandled system error\nError while creating shared memory segment /dev/shm/nccl-3a"),
        raised("OSError: [Errno 28] No space left on device: '/dev/shm/torch_81_2'"),
    ],
    "dataloader-worker-killed": [
        raised("RuntimeError: DataLoader worker (pid 812) is killed by signal: Killed. "),
        raised("RuntimeError: DataLoader worker (pid(s) 812) exited unexpectedly"),
    ],
    "process-limit": [
        raised("OSError: [Errno 24] Too many open files: '/dev/null'"),
        raised("RuntimeError: received 0 items of ancdata"),
        raised("RuntimeError: can't start new thread"),
        raised("BlockingIOError: [Errno 11] Resource temporarily unavailable"),
        raised("OpenBLAS blas_thread_init: pthread_create failed for thread 3 of 64"),
    ],
    "host-out-of-memory-while-loading": [
        died(9, phase="model", hints=["oom_kill 0 -> 1"]),
        raised("OSError: [Errno 12] Cannot allocate memory", phase="model"),
    ],
    "host-out-of-memory": [
        died(9, phase="step", hints=["oom_kill 0 -> 1"]),
        died(9, phase="save", step=4, hints=["oom_kill 2 -> 3"]),
        died(9, hints=["Memory cgroup out of memory: Killed process 4242 (python) total-vm:81234kB"]),
        raised("MemoryError"),
        raised("RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
               "memory: you tried to allocate 40000000000000 bytes. Error code 12 (Cannot allocate memory)"),
    ],
    "no-inodes": [
        raised("checkpoint-4: no inode is left on the file system of output (`df -i`)", "error", status=6),
    ],
    "disk-full": [
        raised("OSError: [Errno 122] Disk quota exceeded"),
        raised("OSError: [Errno 28] No space left on device: '/data/output/checkpoint-4/model.safetensors'"),
        raised("checkpoint-4 was not saved in output: it needs about 4,100 MB, 90 MB are free", "error", status=6),
        raised("RuntimeError: basic_ios::clear: iostream error"),
        raised("RuntimeError: [enforce fail at inline_container.cc:664] . unexpected pos 8384 vs 8276"),
    ],
    "file-system-error": [
        raised("OSError: [Errno 30] Read-only file system: 'output'"),
        raised("OSError: [Errno 116] Stale file handle: '/nfs/output/checkpoint-4'"),
        raised("OSError: [Errno 107] Transport endpoint is not connected: '/mnt/lustre'"),
        raised("OSError: [Errno 5] Input/output error"),
    ],
    "ssh-login-failed": [
        raised("node1: Permission denied (publickey).", "launcher"),
        raised("node1: Host key verification failed.\npdsh@login: node1: ssh exited with exit code 255", "launcher"),
        raised("node1: ssh: connect to host node1 port 22: Connection refused", "launcher"),
        raised("RuntimeError: Using hostfile at hosts but host=node0 was not reachable via ssh.", "launcher"),
    ],
    "permission-denied": [raised("PermissionError: [Errno 13] Permission denied: '/data/output/run.json'")],
    "unsafe-pickle": [
        raised("_pickle.UnpicklingError: Weights only load failed. This file can still be loaded, to do so you have "
               "two options\n\tWeightsUnpickler error: Unsupported global: GLOBAL deepspeed.runtime.fp16.loss_scaler."),
    ],
    "weights-damaged": [
        raised("safetensors._safetensors_rust.SafetensorError: Error while deserializing header: header too large"),
        raised("RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central directory"),
    ],
    "checkpoint-world-size": [
        raised("deepspeed.runtime.zero.utils.ZeRORuntimeException: The checkpoint being loaded used a DP world size of "
               "32 but the current world size is 128."),
    ],
    "weights-mismatch": [
        raised("RuntimeError: Error(s) in loading state_dict for Linear:\n\tsize mismatch for weight: copying a param "
               "with shape torch.Size([4, 2]) from checkpoint, the shape in current model is torch.Size([3, 2])."),
        raised("RuntimeError: Error(s) in loading state_dict for PeftModelForCausalLM:\n\tMissing key(s) in "
               'state_dict: "base_model.model.model.embed_tokens.weight"'),
        raised("RuntimeError: The size of tensor a (512) must match the size of tensor b (256) at dimension 0"),
    ],
    "model-files-missing": [
        raised("OSError: Error no file named model.safetensors, or pytorch_model.bin, found in directory /tmp/model."),
        raised("OSError: /data/model does not appear to have a file named config.json."),
        raised("OSError: output does not appear to have a file named modeling_lingowhale.py."),
    ],
    "hub-access-denied": [
        raised("OSError: You are trying to access a gated repo.\nMake sure to have access to it at "
               "https://huggingface.co/meta-llama/Llama-3-8B.\n401 Client Error. Access to model is restricted."),
        raised("huggingface_hub.errors.HfHubHTTPError: 403 Client Error: Forbidden for url: https://huggingface.co/api"),
        raised("huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error. Repository Not Found for url"),
    ],
    "hub-push-failed": [
        raised("huggingface_hub.errors.HfHubHTTPError: 403 Client Error: Forbidden for url: https://huggingface.co/api/repos/"
               "create", phase="model", traceback='  File "/x/hf_api.py", line 9, in create_repo'),
        raised("requests.exceptions.ConnectionError: HTTPSConnectionPool(host='huggingface.co', port=443): Max retries "
               "exceeded", phase="end", traceback='  File "/x/hub.py", line 9, in push_to_hub'),
    ],
    "hub-unreachable": [
        raised("OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in "
               "the cached files."),
        raised("requests.exceptions.ConnectionError: HTTPSConnectionPool(host='huggingface.co', port=443): Max retries "
               "exceeded (Caused by NameResolutionError: Temporary failure in name resolution)"),
        raised("huggingface_hub.errors.HfHubHTTPError: 429 Client Error: Too Many Requests for url: https://x/api"),
        raised("ConnectionError: ('Connection aborted.', ConnectionResetError(104, 'Connection reset by peer')) "
               "HTTPSConnectionPool(host='huggingface.co', port=443)"),
    ],
    "remote-code-not-trusted": [
        raised("ValueError: The repository deeplang-ai/x contains custom code which must be executed to correctly load "
               "the model. Please pass the argument `trust_remote_code=True` to allow custom code to be run."),
    ],
    "gpu-out-of-memory-while-loading": [raised(GPU_OUT_OF_MEMORY, phase="model")],
    "gpu-out-of-memory": [
        raised(GPU_OUT_OF_MEMORY, phase="step", step=1),
        raised(GPU_OUT_OF_MEMORY, phase="save", step=100),
        raised("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    "gpu-hardware-error": [
        raised("RuntimeError: CUDA error: uncorrectable ECC error encountered"),
        raised("NVRM: Xid (PCI:0000:3b:00): 79, pid=4242, GPU has fallen off the bus.", "died"),
    ],
    "token-id-out-of-range": [
        raised("RuntimeError: CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously "
               "reported at some other API call, so the stacktrace below might be incorrect."),
        raised("IndexError: index out of range in self"),
    ],
    "gpu-driver-mismatch": [
        raised("RuntimeError: CUDA error: no kernel image is available for execution on the device"),
        raised("RuntimeError: The NVIDIA driver on your system is too old (found version 11040)."),
        raised("RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"),
    ],
    "gpu-not-available": [
        raised("torch.AcceleratorError: CUDA error: invalid device ordinal"),
        raised(f"{NCCL}invalid usage\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 3b000"),
        raised("AssertionError: Torch not compiled with CUDA enabled"),
        raised("RuntimeError: No CUDA GPUs are available"),
        raised("RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    ],
    "gpu-kernel-failed": [
        raised("RuntimeError: CUDA error: an illegal memory access was encountered"),
        raised("RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        raised(f"{NCCL}unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.20.5"),
    ],
    "precision-not-supported": [
        raised("ValueError: Your setup doesn't support bf16/gpu. You need to assign use_cpu if you want to train the "
               "model on CPU."),
        raised("ValueError: Type fp16 is not supported on your device."),
        raised("RuntimeError: \"addmm_impl_cpu_\" not implemented for 'Half'"),
    ],
    "fp16-overflow": [
        raised("Exception: Current loss scale already at minimum - cannot decrease scale anymore. Exiting run."),
    ],
    "loss-not-finite": [raised("step 12: loss is nan: lower --learning_rate", "error", status=5)],
    "cuda-toolkit-mismatch": [
        raised("deepspeed.ops.op_builder.builder.CUDAMismatchException: >- DeepSpeed Op Builder: Installed CUDA "
               "version 11.8 does not match the version torch was compiled with 12.1"),
        raised("OSError: CUDA_HOME environment variable is not set. Please set it to your CUDA install root."),
    ],
    "operator-build-failed": [
        raised("RuntimeError: Ninja is required to load C++ extensions (pip install ninja to get it)"),
        raised("RuntimeError: Unable to JIT load the async_io op due to it not being compatible due to "
               "hardware/software issue. None"),
        raised("fatal error: Python.h: No such file or directory\ncompilation terminated."),
        raised("/bin/sh: 1: c++: not found\nninja: build stopped: subcommand failed."),
        raised("FileNotFoundError: [Errno 2] No such file or directory: 'g++'"),
        raised("AttributeError: 'DeepSpeedCPUAdam' object has no attribute 'ds_opt_adam'"),
        raised("RuntimeError: Error building extension 'cpu_adam'"),
    ],
    "flash-attn-unusable": [
        raised("ImportError: /venv/flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so: undefined symbol: "
               "_ZN3c105ErrorC2ENS_14SourceLocationESs"),
        raised("ImportError: FlashAttention2 has been toggled on, but it cannot be used due to the following error: "
               "the package flash_attn seems to be not installed."),
        raised("ModuleNotFoundError: No module named 'flash_attn'"),
    ],
    "shared-library-mismatch": [
        raised("ImportError: /lib/x86_64-linux-gnu/libstdc++.so.6: version `GLIBCXX_3.4.30' not found (required by "
               "/root/.cache/torch_extensions/cpu_adam/cpu_adam.so)"),
        raised("OSError: libcudart.so.12: cannot open shared object file: No such file or directory"),
        raised("ImportError: /venv/torch/lib/libtorch_cuda.so: undefined symbol: ncclCommRegister"),
    ],
    "gradient-checkpointing-conflict": [
        raised("RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn"),
        raised("torch.utils.checkpoint.CheckpointError: torch.utils.checkpoint: Recomputed values for the following "
               "tensors have different metadata than during the forward pass."),
    ],
    "dtype-mismatch": [
        raised("RuntimeError: mat1 and mat2 must have the same dtype, but got Float and BFloat16"),
        raised("RuntimeError: expected scalar type Float but found BFloat16"),
    ],
    "model-type-unknown": [
        raised("ValueError: The checkpoint you are trying to load has model type `nosuch` but Transformers does not "
               "recognize this architecture."),
    ],
    "model-not-causal": [
        raised("ValueError: Unrecognized configuration class T5Config for this kind of AutoModel", phase="model"),
    ],
    "package-missing": [
        raised("ModuleNotFoundError: No module named 'deepspeed'"),
        raised("ValueError: Couldn't instantiate the backend tokenizer from one of: \n(1) a `tokenizers` library "
               "serialization file"),
    ],
    "package-versions": [
        raised("TypeError: Trainer.__init__() got an unexpected keyword argument 'tokenizer'"),
        raised("ImportError: cannot import name 'EncoderDecoderCache' from 'transformers' (/venv/transformers)"),
    ],
    "port-in-use": [
        raised("torch.distributed.DistNetworkError: The server socket has failed to listen on any local network "
               "address. port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use"),
    ],
    "network-address": [
        raised("RuntimeError: Gloo connectFullMesh failed with [../third_party/gloo/gloo/transport/tcp/pair.cc:144] no "
               "error"),
        raised("torch.distributed.DistNetworkError: The IPv4 network addresses of (node9, 29500) cannot be retrieved "
               "(gai error: -2 - Name or service not known)."),
        raised("OSError: [Errno 113] No route to host"),
    ],
    "rendezvous-failed": [
        raised("torch.distributed.DistNetworkError: The client socket has timed out after 3000ms while trying to "
               "connect to (127.0.0.1, 29555)."),
        raised("torch.distributed.DistStoreError: Timed out after 601 seconds waiting for clients. 8/16 clients."),
        raised("ConnectionRefusedError: [Errno 111] Connection refused"),
    ],
    "nccl-system-error": [
        raised(f"{NCCL}unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.20.5"),
        raised(f"{NCCL}remote process exited or there was a network error\nNET/IB : Got completion from peer 10.0.0.2 "
               "with status=12 opcode=0 len=0 vendor err 129"),
    ],
    "collective-timeout": [
        raised(NCCL_TIMEOUT, phase="step", step=12),
        raised(NCCL_TIMEOUT, phase="data"),
        raised(f"{GLOO}unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete", phase="step"),
    ],
    "peer-failed": [
        raised(f"{GLOO}pair.cc:537] Read error [127.0.0.1]:43920: Connection reset by peer."),
        raised(f"{NCCL}remote process exited or there was a network error, NCCL version 2.20.5"),
        raised("BrokenPipeError: [Errno 32] Broken pipe"),
    ],
    "killed": [
        died(9, phase="step", step=12),
        died(9, phase="model"),
        *(Failure("died", status=status) for status in (247, 137, -9)),
        died(9, hints=["oom_kill 0"]),
    ],
    "launcher-ended": [
        raised("deepspeed.launcher.launch (process 7) has died, and its ranks with it", "launcher"),
        Failure("launcher", signal=9),
        Failure("launcher", status=-9),
    ],
    "terminated": [died(15), died(2)],
    "bus-error": [died(7), Failure("died", status=-7)],
    "compiled-code-crash": [died(11), Failure("died", status=139), died(6), died(4)],
    "ranks-missing": [
        Failure("missing", ranks=[4, 5, 6, 7], hosts=["node1"], phase="rendezvous"),
        Failure("stuck", phase="rendezvous", seconds=1800),
    ],
    "host-lost": [Failure("lost", host="node1", phase="step", step=12)],
    "preparation-too-slow": [
        Failure("stuck", phase="data", seconds=1800),
        Failure("stuck", phase="model", seconds=1800),
    ],
    "save-stuck": [Failure("stuck", phase="save", seconds=1800)],
    "rank-stuck": [Failure("stuck", phase="step", step=12, seconds=600)],
    "ended-without-message": [raised("rank 1 on a ended without a message", "died"), Failure("died", status=0)],
}  # fmt: skip
