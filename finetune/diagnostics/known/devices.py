"""GPUs, their memory, precision, and numbers that are not finite."""

from __future__ import annotations

from finetune.diagnostics.known import Known
from finetune.diagnostics.known.processes import CONTINUE

GPU_IS_FULL = (
    r"(cuda|hip|xpu|npu)\b.{0,20}out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED|CUDA_ERROR_OUT_OF_MEMORY"
)

DEVICES = (
    Known(
        "a save does not fit in GPU memory",
        "Stage 3 gathers the weights for the result, layer by layer, beside what training holds.",
        "Leave the GPU more room: a smaller --per_device_train_batch_size (raise --gradient_accumulation_steps by "
        "the "
        "same factor), or `--deepspeed zero3_offload`.",
        seen=GPU_IS_FULL,
        phases=("save", "end"),
    ),
    Known(
        "the model does not fit in GPU memory",
        "Weights, gradients and optimizer states alone are too much for one GPU under this config, or another "
        "process "
        "already uses it (`nvidia-smi`).",
        "Go down the table of ds_configs/README.md: `--deepspeed zero3`, then zero3_offload; more GPUs help under "
        "stage 3; "
        "--use_lora True needs far less. `finetune doctor` with the same flags says what would fit.",
        seen=GPU_IS_FULL,
        phases=("start", "meeting", "model"),
    ),
    Known(
        "GPU memory is full",
        "Activations and logits of a micro-batch grow with its tokens, and come on top of weights and optimizer "
        "states.",
        "In this order: --gradient_checkpointing True; half of --per_device_train_batch_size and twice "
        "--gradient_accumulation_steps; a shorter --model_max_length, or --sequence_parallel_size 2; "
        "`--deepspeed zero3`, then zero3_offload. `finetune doctor` with the same flags says which of these fit.",
        seen=GPU_IS_FULL,
    ),
    Known(
        "a GPU is broken or has fallen off",
        "The driver reports an error of the hardware: memory (ECC), the bus, or the link to other GPUs.",
        '`dmesg | grep -i xid` and `nvidia-smi -q` name the GPU. Leave it out (--exclude "HOST:SLOT"), restart the '
        "host. "
        f"{CONTINUE}",
        seen=r"\bECC\b|\bXid\b|fallen off the bus|GPU is lost|nvlink.*error|uncorrectable|hardware stack error",
    ),
    Known(
        "a token id lies outside the embeddings",
        "A kernel was asked for a row that is not there: tokenizer and weights do not belong together, or tokens "
        "were added "
        "to one only.",
        "Use the tokenizer that came with the model; add tokens with --new_tokens, which grows both. "
        "CUDA_LAUNCH_BLOCKING=1 shows the true line.",
        seen=r"device-side assert|index out of range in self|indexSelect\w*Index|srcIndex < srcSelectDimSize",
    ),
    Known(
        "a kernel touched memory that is not its own",
        "An error in compiled code (attention, fused kernels), libraries that do not belong together, or a GPU "
        "that fails.",
        "Run with CUDA_LAUNCH_BLOCKING=1 to see which; try --attn_implementation sdpa and --batching padded. "
        "Always the "
        "same GPU: leave it out (--exclude).",
        seen=r"illegal memory access|misaligned address|unspecified launch failure"
        r"|illegal instruction was encountered"
        r"|cudaErrorLaunchFailure",
    ),
    Known(
        "this build of torch knows no code for this GPU",
        "It was compiled for other generations of GPUs.",
        "Install the torch wheel for your CUDA version and GPU; then build flash-attn and DeepSpeed's operators "
        "anew (delete "
        "the folder of TORCH_EXTENSIONS_DIR).",
        seen=r"no kernel image is available|not compatible with the current PyTorch installation"
        r"|invalid device function",
    ),
    Known(
        "driver and CUDA do not fit",
        "The driver of this host is older than the CUDA that torch was built with, was updated without a restart, "
        "or the "
        "fabric manager of an NVSwitch machine does not run.",
        "`nvidia-smi` shows the driver's CUDA version: update and restart, or install a torch wheel of that "
        "version; for "
        "error 802 start nvidia-fabricmanager.",
        seen=r"driver version is insufficient|found no NVIDIA driver|driver/library version mismatch"
        r"|NVIDIA driver on your "
        r"system is too old|system not yet initialized|forward compatibility was attempted|cudaGetDeviceCount",
    ),
    Known(
        "more ranks than GPUs on a host",
        "Each rank takes the GPU of its number, and this number does not exist.",
        'Start fewer: --num_gpus N, or slots=N in the hostfile; choose with --include "HOST:0,1", not with '
        "CUDA_VISIBLE_DEVICES.",
        seen=r"invalid device ordinal|device >= 0 && device < num_gpus|duplicate GPU detected",
    ),
    Known(
        "no GPU is seen",
        "torch was installed without CUDA, the container was started without GPUs, or CUDA_VISIBLE_DEVICES is empty.",
        "`nvidia-smi` and `python -c 'import torch; print(torch.cuda.device_count())'` on that host; in docker "
        "`--gpus all`. "
        "To train on the CPU: --use_cpu True.",
        seen=r"no CUDA GPUs are available|not compiled with CUDA enabled|no CUDA-capable device"
        r"|no GPU resources available",
    ),
    Known(
        "a GPU is taken by another process",
        "It is in exclusive mode, or a process of an earlier run still holds it.",
        "`nvidia-smi` shows who; end it by its id, or choose other GPUs with --include.",
        seen=r"device\(?s?\)? is/are busy|all CUDA-capable devices are busy|device is busy",
    ),
    Known(
        "a GPU library failed",
        "Mostly because GPU memory is nearly full, or an index was out of range shortly before.",
        "Take a smaller --per_device_train_batch_size; if it stays, run with CUDA_LAUNCH_BLOCKING=1 to see which "
        "line it is.",
        seen=r"CUBLAS_STATUS_|CUDNN_STATUS_|CUSOLVER_STATUS_|cuDNN error",
    ),
    Known(
        "this device cannot compute in bf16",
        "bf16 needs an Ampere GPU (A100, RTX 30) or newer.",
        "Use --fp16 True instead of --bf16 True, or neither for float32.",
        seen=r"\bbf(loat)?16\b.{0,60}(not supported|isn't supported|unsupported)|doesn't support bf16"
        r"|type bf16 is not"
        r"|(not supported|requires).{0,40}\bbf(loat)?16\b",
    ),
    Known(
        "this device cannot compute in fp16",
        "Half precision needs a GPU.",
        "Leave --fp16 out: a CPU computes in float32.",
        seen=r"type fp16 is not supported|not implemented for 'Half'"
        r"|fp16.{0,60}(not supported|requires a gpu|only.*gpu)",
    ),
    Known(
        "fp16 is too small for this model's gradients",
        "Every step overflowed, however small the loss scale: many models that were trained in bf16 do so.",
        "Use --bf16 True where the GPU can (A100 or newer), else a lower --learning_rate and a smaller "
        "--max_grad_norm.",
        seen=r"loss scale already at minimum|minimum loss scale",
    ),
    Known(
        "the loss or the gradient is no longer finite",
        "A learning rate that is too high, a warm-up that is too short, fp16, or rows that are broken.",
        "Lower --learning_rate, lengthen --warmup_steps, prefer --bf16 True; look at the rows with `finetune "
        "preview`. "
        f"{CONTINUE}",
        seen=r"\b(loss|grad_norm) is (nan|-?inf)|not finite|(returned|contains?|found) (nan|inf)|nan or inf"
        r"|NumericsError",
    ),
)
