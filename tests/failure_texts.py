"""What libraries and systems really say, and the cause that each is an example of."""

from __future__ import annotations

from typing import NamedTuple

from finetune.failures import Failure


def said(error: str, kind: str = "exception", **others) -> Failure:
    """A failure that says this."""
    return Failure(kind, error, **others)


def died(number: int, **others) -> Failure:
    """A process that a signal ended."""
    return Failure("died", signal=number, **others)


OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.15 "
    "GiB of "
    "which 1.06 GiB is free. Including non-PyTorch memory, this process has 78.08 GiB memory in use. Of the allocated "
    "memory 75.00 GiB is allocated by PyTorch, and 1.33 GiB is reserved by PyTorch but unallocated."
)
WATCHDOG = (
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE, NumelIn=1, "
    "NumelOut=1, Timeout(ms)=1800000) ran for 1800453 milliseconds before timing out."
)
NCCL = "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:2021, "


class Sample(NamedTuple):
    """The title of a cause, and a failure that has it."""

    title: str
    failure: Failure


SAMPLES = [
    Sample(title, failure)
    for title, failures in {
        "the host ran out of memory while the model was loaded": [died(9, phase="model", hints=["oom_kill 0 -> 1"])],
        "the host ran out of memory in a save": [died(9, phase="save", step=4, hints=["oom_kill 2 -> 3"])],
        "the host ran out of memory": [
            died(9, phase="step", hints=["oom_kill 0 -> 1"]),
            died(9, hints=["Memory cgroup out of memory: Killed process 4242 (python) total-vm:81234kB"]),
        ],
        "a process is stopped": [Failure("stuck", phase="step", seconds=300, hints=["State: T (stopped)"])],
        "a save waits for the disk": [Failure("stuck", phase="save", hints=["State: D (disk sleep)"])],
        "reading waits for the disk": [Failure("stuck", phase="data", hints=["State: D (disk sleep)"])],
        "the build of an operator waits for another one": [
            Failure("stuck", phase="model", traceback='  File "/x/torch/utils/file_baton.py", line 50 in wait')
        ],
        "/dev/shm is full or too small": [
            said("RuntimeError: DataLoader worker (pid 812) is killed by signal: Bus error. It is possible that "
                 "dataloader's workers are out of shared memory. Please try to raise your shared memory limit."),
            said("ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared "
                 "memory "
                 "(shm)."),
            said(NCCL + "unhandled system error\nError while creating shared memory segment /dev/shm/nccl-3a "
                 "(size 9637888)"),
            said("OSError: [Errno 28] No space left on device: '/dev/shm/torch_81_2'"),
        ],
        "a process that loads data was killed": [
            said("RuntimeError: DataLoader worker (pid 812) is killed by signal: Killed. "),
            said("RuntimeError: DataLoader worker (pid(s) 812) exited unexpectedly"),
        ],
        "the disk quota is used up": [said("OSError: [Errno 122] Disk quota exceeded")],
        "the disk is full": [
            said("OSError: [Errno 28] No space left on device: '/data/output/checkpoint-4/model.safetensors'"),
            said("checkpoint-4 was not saved in output: it needs about 4,100 MB, 90 MB are free", "error", status=6),
        ],
        "a file could not be written to its end": [
            said("RuntimeError: basic_ios::clear: iostream error"),
            said("RuntimeError: [enforce fail at inline_container.cc:664] . unexpected pos 8384 vs 8276"),
            said("RuntimeError: PytorchStreamWriter failed writing file data/3: file write failed"),
        ],
        "a file is larger than may be written": [said("OSError: [Errno 27] File too large")],
        "the file system is mounted read-only": [said("OSError: [Errno 30] Read-only file system: 'output'")],
        "the network file system lost a file or its server": [
            said("OSError: [Errno 116] Stale file handle: '/nfs/output/checkpoint-4'"),
            said("OSError: [Errno 107] Transport endpoint is not connected: '/mnt/lustre'"),
        ],
        "the disk reports errors": [said("OSError: [Errno 5] Input/output error")],
        "too many open files": [
            said("OSError: [Errno 24] Too many open files: '/dev/null'"),
            said("RuntimeError: received 0 items of ancdata"),
        ],
        "no more processes or threads may be started": [
            said("RuntimeError: can't start new thread"),
            said("BlockingIOError: [Errno 11] Resource temporarily unavailable"),
            said("OpenBLAS blas_thread_init: pthread_create failed for thread 3 of 64"),
        ],
        "the host has no memory left": [
            said("OSError: [Errno 12] Cannot allocate memory"),
            said("MemoryError"),
            said("RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
                 "memory: "
                 "you tried to allocate 40000000000000 bytes. Error code 12 (Cannot allocate memory)"),
        ],
        "ssh does not accept the key": [
            said("node1: Permission denied (publickey).", "launcher"),
            said("node1: Permission denied (publickey,password).\npdsh@login: node1: ssh exited with exit code 255",
                 "launcher"),
        ],
        "no permission for a file": [said("PermissionError: [Errno 13] Permission denied: '/data/output/run.json'")],
        "a checkpoint holds more than numbers": [
            said("_pickle.UnpicklingError: Weights only load failed. This file can still be loaded, to do so you "
                 "have two "
                 "options\n\tWeightsUnpickler error: Unsupported global: GLOBAL deepspeed.runtime.fp16.loss_scaler."
                 "LossScaler was not an allowed global by default."),
            said("ValueError: Due to a serious vulnerability issue in `torch.load`, even with `weights_only=True`, "
                 "we now "
                 "require users to upgrade torch to at least v2.6 in order to use the function."),
        ],
        "a weight file is damaged or not whole": [
            said("safetensors._safetensors_rust.SafetensorError: Error while deserializing header: header too large"),
            said("safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer"),
            said("RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central directory"),
        ],
        "a checkpoint of another number of ranks": [
            said("deepspeed.runtime.zero.utils.ZeRORuntimeException: The checkpoint being loaded used a DP world "
                 "size of "
                 "32 but the current world size is 128. Automatic adjustment of ZeRO's optimizer state partitioning "
                 "with "
                 "a new world size is not currently supported."),
        ],
        "what should be a checkpoint is none": [said("ValueError: Can't find a valid checkpoint at "
        "output/checkpoint-4")],
        "weights of another size": [
            said('RuntimeError: Error(s) in loading state_dict for Linear:\n\tMissing key(s) in state_dict: "bias". '
                 "\n\t"
                 "size mismatch for weight: copying a param with shape torch.Size([4, 2]) from checkpoint, the "
                 "shape in "
                 "current model is torch.Size([3, 2])."),
            said("RuntimeError: The size of tensor a (512) must match the size of tensor b (256) at non-singleton "
                 "dimension 0"),
        ],
        "weights are missing or have other names": [
            said("RuntimeError: Error(s) in loading state_dict for PeftModelForCausalLM:\n\tMissing key(s) in "
                 "state_dict: "
                 '"base_model.model.model.embed_tokens.weight"'),
        ],
        "saved weights are empty": [
            said("output/adapter_model.safetensors: lora_A.weight is empty, shape [0]", "error", status=4)
        ],
        "the adapter learned nothing": [
            said("output: all 14 LoRA B matrices are still zero: the run learned nothing", "error", status=4)
        ],
        "the folder holds no weights": [
            said("OSError: Error no file named model.safetensors, or pytorch_model.bin, found in directory /tmp/mm2."),
            said("OSError: /data/model does not appear to have a file named config.json. Checkout "
                 "'https://huggingface.co//data/model/tree/main' for available files."),
        ],
        "a Python file of the model is missing": [
            said("OSError: output does not appear to have a file named modeling_lingowhale.py. Checkout ..."),
        ],
        "the hub wants to know who you are": [
            said("OSError: You are trying to access a gated repo.\nMake sure to have access to it at "
                 "https://huggingface.co/meta-llama/Llama-3-8B.\n401 Client Error. Access to model is restricted."),
            said("huggingface_hub.errors.HfHubHTTPError: 403 Client Error: Forbidden for url: "
                 "https://huggingface.co/api"),
        ],
        "the hub asks you to wait": [
            said("huggingface_hub.errors.HfHubHTTPError: 429 Client Error: Too Many Requests for url: "
                 "https://huggingface.co/api/models/x"),
        ],
        "there is no such repository on the hub": [
            said("huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error. Repository Not Found for url"),
        ],
        "the hub cannot be reached": [
            said("OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find "
                 "them in "
                 "the cached files."),
            said("requests.exceptions.ConnectionError: HTTPSConnectionPool(host='huggingface.co', port=443): Max "
                 "retries "
                 "exceeded (Caused by NameResolutionError: Temporary failure in name resolution)"),
            said("ConnectionError: ('Connection aborted.', ConnectionResetError(104, 'Connection reset by peer')) "
                 "HTTPSConnectionPool(host='huggingface.co', port=443)"),
        ],
        "the model brings code that is not trusted": [
            said("ValueError: The repository deeplang-ai/x contains custom code which must be executed to correctly "
                 "load "
                 "the model. Please pass the argument `trust_remote_code=True` to allow custom code to be run."),
        ],
        "columns of the data have mixed types": [
            said("pyarrow.lib.ArrowInvalid: cannot mix list and non-list, non-null values"),
            said("pyarrow.lib.ArrowInvalid: JSON parse error: Column(/id) changed from string to number in row 3"),
        ],
        "a save does not fit in GPU memory": [said(OOM, phase="save", step=100)],
        "the model does not fit in GPU memory": [said(OOM, phase="model")],
        "GPU memory is full": [
            said(OOM, phase="step", step=1),
            said("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                 phase="step"),
        ],
        "a GPU is broken or has fallen off": [
            said("RuntimeError: CUDA error: uncorrectable ECC error encountered"),
            said("NVRM: Xid (PCI:0000:3b:00): 79, pid=4242, GPU has fallen off the bus.", "died"),
        ],
        "a token id lies outside the embeddings": [
            said("RuntimeError: CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously "
                 "reported at some other API call, so the stacktrace below might be incorrect."),
            said("IndexError: index out of range in self"),
        ],
        "a kernel touched memory that is not its own": [
            said("RuntimeError: CUDA error: an illegal memory access was encountered"),
            said("RuntimeError: CUDA error: unspecified launch failure"),
        ],
        "this build of torch knows no code for this GPU": [
            said("RuntimeError: CUDA error: no kernel image is available for execution on the device")
        ],
        "driver and CUDA do not fit": [
            said("RuntimeError: The NVIDIA driver on your system is too old (found version 11040)."),
            said("RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"),
        ],
        "more ranks than GPUs on a host": [
            said("torch.AcceleratorError: CUDA error: invalid device ordinal"),
            said(NCCL + "invalid usage\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 3b000"),
        ],
        "no GPU is seen": [
            said("AssertionError: Torch not compiled with CUDA enabled"),
            said("RuntimeError: No CUDA GPUs are available"),
            said("RuntimeError: Unable to proceed, no GPU resources available", "launcher"),
        ],
        "a GPU is taken by another process": [
            said("RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable")
        ],
        "a GPU library failed": [
            said("RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        ],
        "this device cannot compute in bf16": [
            said("ValueError: Your setup doesn't support bf16/gpu. You need to assign use_cpu if you want to train "
                 "the "
                 "model on CPU."),
            said("ValueError: Type bf16 is not supported on your device."),
        ],
        "this device cannot compute in fp16": [
            said("ValueError: Type fp16 is not supported on your device."),
            said("RuntimeError: \"addmm_impl_cpu_\" not implemented for 'Half'"),
        ],
        "fp16 is too small for this model's gradients": [
            said("Exception: Current loss scale already at minimum - cannot decrease scale anymore. Exiting run."),
        ],
        "the loss or the gradient is no longer finite": [
            said("step 12: loss is nan: lower --learning_rate, warm up longer (--warmup_steps), or look at the data",
                 "error", status=5),
        ],
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
    }.items()
    for failure in failures
]  # fmt: skip
