"""Of processes, hosts, disks, the hub, GPUs and numbers: the title of a cause, and failures that have it."""

from __future__ import annotations

from failure_texts.made import NCCL, OOM, died, said
from finetune.diagnostics import Failure

OF_MACHINES = {
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
}  # fmt: skip
