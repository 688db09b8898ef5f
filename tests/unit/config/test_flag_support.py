"""Every flag of the installed transformers is served as the table says, and what is not served is said."""

import pytest

from finetune.config import parse
from finetune.config.arguments import TRAINING_DEFAULTS, training_flags
from finetune.config.flag_support import REFUSED, WITHOUT_EFFECT
from finetune.utils.errors import ConfigError

# By transformers, as it documents them.
HONOURED = frozenset(
    "num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args "
    "optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
    "torch_compile torch_compile_backend torch_compile_mode use_liger_kernel use_cache neftune_noise_alpha "
    "torch_empty_cache_steps logging_strategy logging_steps logging_first_step log_on_each_node log_level "
    "log_level_replica include_num_input_tokens_seen run_name project trackio_space_id trackio_bucket_id "
    "trackio_static_space_id eval_steps eval_delay eval_on_start save_strategy save_steps load_best_model_at_end "
    "full_determinism seed use_cpu dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
    "dataloader_prefetch_factor ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_timeout debug "
    "skip_memory_metrics do_train".split()
)
# By our batches, loss, evaluation, checkpoints, hardware decisions and launcher, or renamed by transformers itself.
SERVED_HERE = frozenset(
    "output_dir per_device_train_batch_size gradient_accumulation_steps label_smoothing_factor data_seed "
    "train_sampling_strategy dataloader_drop_last activation_checkpointing activation_checkpointing_kwargs "
    "gradient_checkpointing gradient_checkpointing_kwargs liger_kernel_config bf16 fp16 tf32 eval_strategy "
    "per_device_eval_batch_size metric_for_best_model auto_find_batch_size save_only_model save_total_limit "
    "resume_from_checkpoint deepspeed report_to ddp_find_unused_parameters local_rank".split()
)
REQUIRED = "--model_name_or_path m --data_path d --output_dir o".split()
VALUES = {bool: "True", int: "3", float: "3", str: "some"}


def other_value(name: str) -> str:
    """A value that is not the default."""
    flag = training_flags()[name]
    if flag.shape.kind is bool:
        return str(not TRAINING_DEFAULTS.get(name, flag.default))
    return next((choice for choice in flag.shape.choices if choice != flag.default), VALUES[flag.shape.kind])


def test_every_flag_is_in_exactly_one_class():
    """A new flag of transformers fails here, until somebody has decided what it does."""
    classes = [HONOURED, SERVED_HERE, set(WITHOUT_EFFECT), set(REFUSED)]
    assert sum(map(len, classes)) == len(set().union(*classes))
    assert set().union(*classes) == set(training_flags())


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_flag_that_cannot_be_served_is_refused_and_its_default_is_not(name):
    with pytest.raises(ConfigError, match=f"--{name} ") as caught:
        parse([*REQUIRED, f"--{name}", other_value(name)])
    assert REFUSED[name] in str(caught.value)
    default = training_flags()[name].default
    if default is not None:
        assert not [note for note in parse([*REQUIRED, f"--{name}", str(default)]).notes if name in note]


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_a_flag_without_effect_is_said(name):
    (note,) = parse([*REQUIRED, f"--{name}", other_value(name)]).notes
    assert note.startswith(f"--{name} ") and WITHOUT_EFFECT[name] in note


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--max_steps 5 --num_train_epochs 2", "--num_train_epochs 2.0 has no effect: --max_steps 5 decides"),
        ("--save_strategy epoch --save_steps 5", "--save_steps 5.0 has no effect: --save_strategy is epoch"),
        ("--save_strategy no --save_total_limit 3", "--save_total_limit 3 has no effect"),
        ("--logging_strategy epoch --logging_steps 5", "--logging_steps 5.0 has no effect"),
        ("--eval_steps 5", "--eval_steps 5.0 has no effect: no conversations are held out"),
        ("--validation_share 0.1 --eval_steps 5", "--eval_steps 5.0 has no effect: --eval_strategy is epoch"),
        ("--hub_token secret", "--hub_token *** has no effect"),
        ("--optim sgd --adam_beta1 0.5", "--adam_beta1 0.5 has no effect: --optim is sgd"),
        ("--dataloader_prefetch_factor 4", "--dataloader_prefetch_factor 4 has no effect"),
        ("--deepspeed zero2 --ddp_bucket_cap_mb 4", "--ddp_bucket_cap_mb 4 has no effect"),
        ('--gradient_checkpointing_kwargs {"every_n_layers":2}', "has no effect: --activation_checkpointing is False"),
    ],
)
def test_a_flag_without_effect_beside_others_is_said(flags, named):
    notes = [note for note in parse([*REQUIRED, *flags.split()]).notes if "has no effect" in note]
    assert len(notes) == 1 and named in notes[0]


@pytest.mark.parametrize(
    "flags",
    [
        "--num_train_epochs 2 --save_steps 5 --save_total_limit 3 --logging_steps 5",
        "--validation_share 0.1 --eval_strategy steps --eval_steps 5 --per_device_eval_batch_size 2",
        "--optim adamw_torch --adam_beta1 0.5",
        "--dataloader_num_workers 2 --dataloader_prefetch_factor 4",
        "--do_train True --local_rank 0",
    ],
)
def test_a_flag_that_has_an_effect_is_not_complained_about(flags):
    assert not [note for note in parse([*REQUIRED, *flags.split()]).notes if "has no effect" in note]
