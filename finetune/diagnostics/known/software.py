"""Builds, versions, configs, and what models and libraries say to each other."""

from __future__ import annotations

from finetune.diagnostics.known import Known

TESTED_SET = "Install the tested set: `pip install -r requirements.txt`, on every host."
WITHOUT_FLASH = "or go without: --attn_implementation sdpa."

SOFTWARE = (
    Known(
        "CUDA of this host and CUDA of torch differ",
        "DeepSpeed compiles operators with the host's toolkit, which must be of the version that torch was built with.",
        "Install that toolkit and point CUDA_HOME at it, or a torch wheel for the one that is there. zero1, zero2 "
        "and zero3 "
        "compile nothing for a GPU; the offload configs and zeropp do.",
        seen=r"CUDAMismatch|installed CUDA version|detected CUDA version.*mismatches|version mismatch.*cuda",
    ),
    Known(
        "the CUDA toolkit is missing",
        "An operator has to be compiled, and there is no nvcc: the runtime that comes with torch does not include it.",
        "Install the CUDA toolkit and set CUDA_HOME, or take a config that compiles nothing for a GPU: zero1, "
        "zero2, zero3.",
        seen=r"CUDA_HOME|nvcc.{0,30}(not found|no such file)|unable to run .*nvcc|MissingCUDAException",
    ),
    Known(
        "ninja is missing",
        "torch compiles operators with it.",
        "`pip install ninja` in the environment of every host.",
        seen=r"ninja.{0,40}(not (being )?installed|required|not found|not available)|no module named '?ninja",
    ),
    Known(
        "libaio is missing",
        "zero3_nvme reads and writes its files with it.",
        "`apt-get install libaio-dev` (libaio-devel on Red Hat) on every host, or take zero3_offload.",
        seen=r"libaio|async_io",
    ),
    Known(
        "the compiler or Python's headers are missing",
        "Operators are compiled on first use.",
        "`apt-get install g++ python3-dev` on every host.",
        seen=r"Python\.h|((?<!std)c\+\+|g\+\+|gcc|cc1plus|clang)'?\W{0,3}.{0,40}(not found|no such file|not exist)|"
        r"no such file.{0,40}(c\+\+|g\+\+|gcc|cc1plus)|failed to find C compiler",
    ),
    Known(
        "a C++ library is older than what was compiled",
        "Something was built with a newer compiler, or on a newer system, than this host has.",
        "Build on the oldest host, or delete compiled operators (TORCH_EXTENSIONS_DIR) and build here; with conda: "
        "`conda "
        "install -c conda-forge libstdcxx-ng`.",
        seen=r"GLIBCXX_|CXXABI_|GLIBC_\d",
    ),
    Known(
        "flash-attn does not fit this torch",
        "It was compiled for another version of torch or CUDA.",
        f"Build it anew for this torch, {WITHOUT_FLASH}",
        seen=r"flash_attn.*undefined symbol|undefined symbol.*flash|flash_attn\w*\.\w*so",
    ),
    Known(
        "flash-attn is missing",
        "It was asked for, and is not installed on this host.",
        f"Install flash-attn, {WITHOUT_FLASH}",
        seen=r"FlashAttention\d? has been toggled on|no module named '?flash_attn|flash.?attn.*(not|isn't) (be )?"
        r"(installed|available|found)|cannot import name .* from '?flash_attn",
    ),
    Known(
        "compiled code and libraries do not fit",
        "A shared library is missing, or is of another version than the one it was compiled against.",
        f"{TESTED_SET} Delete compiled operators (the folder of TORCH_EXTENSIONS_DIR); LD_LIBRARY_PATH must reach "
        "other "
        "hosts through `.deepspeed_env`.",
        seen=r"undefined symbol|cannot open shared object file|version `?\w+' not found|symbol lookup error",
    ),
    Known(
        "an operator of DeepSpeed was not built",
        "Its compilation failed earlier, and this is what is left of it; the true reason stands further up in the "
        "output.",
        "Every host needs a C++ compiler and ninja; `ds_report` shows which operators can be built. Without offload "
        "(`--deepspeed zero3`) none is needed on a GPU.",
        seen=r"ds_opt_ada|unable to JIT|error building extension|ninja: build stopped|DeepSpeedCPUAdam.*attribute",
    ),
    Known(
        "batch sizes contradict each other",
        "train_batch_size must be micro-batch x accumulation x ranks, and a config has numbers of its own or the "
        "launcher "
        "started another number of ranks.",
        'Write "auto" in the DeepSpeed config and give --per_device_train_batch_size and '
        "--gradient_accumulation_steps; "
        "start with the `deepspeed` command.",
        seen=r"train_batch_size is not equal|check batch related parameters"
        r"|train_batch_size.*(divisible|greater than 0)",
    ),
    Known(
        "DeepSpeed config and command line differ",
        "A number stands in both, with two values.",
        'Write "auto" in the JSON, or take a shipped config: --deepspeed zero3.',
        seen=r"please correct the following DeepSpeed config|mismatch TrainingArguments",
    ),
    Known(
        "a buffer for NVMe is too small",
        "buffer_size counts elements and must hold one rank's share of the largest parameter, usually the embedding.",
        "Raise buffer_size in your copy of zero3_nvme.json (ds_configs/README.md).",
        seen=r"more elements \d+ than buffer size|elements_per_buffer",
    ),
    Known(
        "stage 3 lost track of the parameters",
        "The model takes other ways from step to step or from rank to rank, e.g. mixtures of experts.",
        "Use `--deepspeed zero2` or zero1, with --use_lora True if the model is too large for that.",
        seen=r"inflight params|invalid (cached )?trace|tracing error at step|ds_status.*(INFLIGHT|NOT_AVAILABLE)",
    ),
    Known(
        "checkpointed activations were recomputed in another shape",
        "Under stage 3, frozen parameters are split again before they are recomputed.",
        "--gradient_checkpointing True with --activation_checkpointing_kwargs '{\"use_reentrant\": true}'; or "
        "--gradient_checkpointing False, or `--deepspeed zero2`.",
        seen=r"recomputed values for the following|different number of tensors was saved"
        r"|more tensors during recomputation"
        r"|torch\.utils\.checkpoint: |saved .* vs\.? recomputed",
    ),
    Known(
        "no gradient reaches the trained parameters",
        "Checkpointing cuts the gradient off where the embeddings are frozen, or nothing is trained at all.",
        "--activation_checkpointing_kwargs '{\"use_reentrant\": false}', or --gradient_checkpointing False; with "
        "LoRA check "
        "--lora_target_modules.",
        seen=r"does not require grad|no grad_?fn|none of the inputs have requires_grad",
    ),
    Known(
        "two precisions meet",
        "Adapters and base, or weights and inputs, are in different types.",
        "Give one of --bf16 True and --fp16 True, none twice; leave layers out of --modules_to_save; with code of "
        "the "
        "model's own, try float32.",
        seen=r"must have the same dtype|expected scalar type|same dtype, but got"
        r"|expected .* but found (float|half|bfloat)"
        r"|expected m1 and m2",
    ),
    Known(
        "a library has renamed an argument",
        "The versions of transformers, peft, accelerate and DeepSpeed do not belong together, or the code that "
        "comes with a "
        "model is older than they are.",
        TESTED_SET,
        seen=r"unexpected keyword argument|missing \d+ required (positional|keyword)"
        r"|positional arguments? but \d+ (was|were)",
    ),
    Known(
        "this transformers does not know the model",
        "The model is newer than the library, or its code is in its own repository.",
        "Update transformers, or, where the model brings code, read it and add --trust_remote_code True.",
        seen=r"does not recognize this architecture|unrecognized (configuration class|model in)",
    ),
    Known(
        "a package for the tokenizer is missing",
        "Some tokenizers are converted with sentencepiece or tiktoken when they are loaded.",
        "`pip install sentencepiece tiktoken protobuf` on every host.",
        seen=r"instantiate the backend tokenizer|sentencepiece|tiktoken|protobuf",
    ),
    Known(
        "a package is missing on this host",
        "Python there is another one than where the packages were installed, or they were installed on one host only.",
        f"{TESTED_SET} The launcher starts the same path of Python everywhere.",
        seen=r"ModuleNotFoundError|no module named",
    ),
    Known(
        "packages do not belong together",
        "One expects names that another no longer has, or does not have yet.",
        TESTED_SET,
        seen=r"cannot import name|has no attribute '__version__'|requires .*(>=|==|<).* but"
        r"|is required for a normal functioning",
    ),
)
