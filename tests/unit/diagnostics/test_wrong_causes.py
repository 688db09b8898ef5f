"""Messages of libraries that resemble those of known causes: a wrong cause is worse than none."""

from dataclasses import replace

import pytest

from finetune.diagnostics import Failure, format_failure_page, likely_cause
from tests.helpers.failure_samples import raised

# Raised by torch, transformers, DeepSpeed, peft, accelerate, datasets, huggingface_hub, trackers, or the system.
WITHOUT_CAUSE = """
ValueError: Expected a bool value for `trust_remote_code` but got X
ValueError: `trust_remote_code` is not supported anymore.
TypeError: get_cosine_with_min_lr_schedule_with_warmup() got an unexpected keyword argument 'min_lr_ratio'
TypeError: AdamW.__init__() got an unexpected keyword argument 'betas2'
TypeError: get_wsd_schedule() missing 1 required positional argument: 'num_decay_steps'
ImportError: FlashAttention3 requires compute capability >= 9.0, but found A100 with compute capability 8.0
RuntimeError: Kernel requires 65536 bytes of shared memory (>= 48KB), but X. Call kernel.set_shared_memory_config(
OSError: /models/out does not appear to have a file named adapter_config.json.
OSError: X does not appear to have a file named preprocessor_config.json. Checkout 'https://huggingface.co/X/tree/main'
ValueError: Invalid token id 5.
ValueError: invalid token: 'X'
RuntimeError: You cannot infer task automatically within `pipeline` when using offline mode
AssertionError: Unexpected scalar type: X
RuntimeError: expected scalar type Long but found Float
ValueError: Queries and passages must have the same dtype
AssertionError: Box tensor contains infinite or NaN!
AssertionError: dynamic_strides must only contain INFER_STRIDE, DYNAMIC, or DUCK
AssertionError: scales contains NaN values
AssertionError: to_quant must not contain NaNs
RuntimeError: Found infinity values in VB-LoRA logits.
AssertionError: shape mismatch: [2, 3] != [3, 2]
AssertionError: bias size mismatch: m=5 != bias.size(0)=4
AssertionError: Size mismatch. 3 is allocated at addr 4 but tensor size is 5
RuntimeError: Detected mismatch between collectives on ranks: sizes mismatch
ValueError: DeepGEMM linear requires FP16 or BF16 activations, got torch.float32
AssertionError: BF16Optimizer: requires bfloat16 to be enabled
TypeError: PSOFT init requires float32/float16/bfloat16. Re-quantize after init if needed.
PermissionError: Tried to overwrite X but a dataset can't overwrite itself.
RuntimeError: CUDA error: operation not permitted when stream is capturing
RuntimeError: The output at index 0 was marked as the loss, but it does not require gradients
RuntimeError: It is not possible to get the gradient edge for a Tensor that does not require gradients
TimeoutError: Timed out waiting for etcd server to be ready!
RuntimeError: Timed out waiting for lock: X
AssertionError: This system does not appear to support tmpfs (/dev/shm).
FileExistsError: [Errno 17] File exists: '/dev/shm/output'
RuntimeError: Invalid header, expected CacheCompiledArtifact or AOTCompiledArtifact, got:
safetensors_rust.SafetensorError: File does not contain tensor lm_head.weight
ModuleNotFoundError: Failed to import `TRANSFORMERS_TEST_BACKEND` 'X'! This should be the name of an installed module.
requests.exceptions.HTTPError: 404 Client Error: Not Found for url: https://api.wandb.ai/files/run
ConnectionError: HTTPSConnectionPool(host='api.wandb.ai', port=443): Max retries exceeded: NameResolutionError
mlflow.exceptions.MlflowException: API request to http://mlflow:5000/api failed: [Errno 111] Connection refused
wandb.errors.CommError: Error uploading run: ReadTimeout
urllib.error.URLError: <urlopen error [Errno -2] Name or service not known>
RuntimeError: async_io is a key of the aio section
ValueError: SentencePiece processors take no argument model_file
RuntimeError: The loss of step 3 is a tensor of 2 values, expected one
KeyError: 'ecc'
IndexError: list index out of range
ValueError: max_position_embeddings 1024 is less than the 2048 of --model_max_length
""".strip().splitlines()
# The phase in which a message has another cause, or none.
IN_PHASE = [
    ("weights-mismatch", "model", "RuntimeError: The size of tensor a (512) must match the size of tensor b (256)"),
    (None, "step", "RuntimeError: The size of tensor a (512) must match the size of tensor b (256) at dimension 0"),
    (None, "step", "RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x8 and 4x8)"),
    (None, "model", "ValueError: the weights of the base are not finite: NaN in lm_head.weight"),
    ("loss-not-finite", "step", "RuntimeError: The total norm of order 2.0 for gradients is non-finite"),
    (None, "step", "ConnectTimeout: HTTPSConnectionPool(host='huggingface.co', port=443)"),
    ("hub-unreachable", "model", "ConnectTimeout: HTTPSConnectionPool(host='huggingface.co', port=443)"),
    (None, "end", "HfHubHTTPError: 403 Client Error: Forbidden for url: https://huggingface.co/api/models/a/b"),
    ("model-files-missing", "model", "ValueError: Unrecognized model in out. Should have a `model_type` key in its"),
    ("weights-damaged", "model", "_pickle.UnpicklingError: invalid load key, 'v'."),
    ("weights-damaged", "model", "Weights only load failed. WeightsUnpickler error: Unsupported operand 118"),
    ("package-versions", "model", "x>=2 is required for a normal functioning of this module, but found x==1"),
    (None, "model", "RuntimeError: unable to mmap 512 bytes from file </data/model.bin>: Invalid argument (22)"),
]  # fmt: skip
POSSIBLE = [
    "IndexError: index out of range in self",
    "RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn",
    "BrokenPipeError: [Errno 32] Broken pipe",
    "TypeError: LlamaAttention.forward() got an unexpected keyword argument 'position_embeddings'",
]


@pytest.mark.parametrize("message", WITHOUT_CAUSE)
@pytest.mark.parametrize("phase", ["model", "step", "end"])
def test_no_cause_is_named(message, phase):
    assert likely_cause(raised(message, phase=phase)) is None


@pytest.mark.parametrize(("code", "phase", "message"), IN_PHASE)
def test_the_phase_decides(code, phase, message):
    cause = likely_cause(raised(message, phase=phase))
    assert (cause and cause.code) == code


def test_errors_that_explain_themselves_have_no_cause():
    text = "the Trainer refuses these flags: X() got an unexpected keyword argument, [Errno 28] No space left on device"
    assert [likely_cause(raised(text, "error", status=status)) for status in (2, 3, 4)] == [None] * 3
    assert likely_cause(raised(text, "error", status=6)).code == "disk-full"


@pytest.mark.parametrize("message", POSSIBLE)
def test_a_message_with_several_causes_has_a_possible_one(message):
    failure = raised(message, phase="step")
    assert likely_cause(failure).is_possible
    assert "Possible cause: " in format_failure_page(failure) and "Likely cause" not in format_failure_page(failure)


def test_what_only_the_traceback_says_is_possible():
    trace = "Traceback (most recent call last):\nOSError: [Errno 28] No space left on device"
    handled = raised("ValueError: x", traceback=trace)
    assert likely_cause(handled).is_possible and not likely_cause(replace(handled, error="")).is_possible


def test_a_signal_is_a_fact():
    assert not likely_cause(Failure("died", signal=9)).is_possible
