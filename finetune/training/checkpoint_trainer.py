"""The part of the Trainer that saves: complete checkpoints, the result, nothing pickled but optimizer states."""

import time
from abc import abstractmethod
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DeepSpeedSchedulerWrapper
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer import SCHEDULER_NAME

from finetune.checkpoint import Manifest, is_complete, key_of, read_manifest, steps_in, verified_loads
from finetune.checkpoint.saver import RunIdentity, Saver, checkpoint_bytes, checkpoint_engine, trained_shapes
from finetune.dataset.dataloader import MicroBatchDataset
from finetune.export.base_tensors import BaseTensors
from finetune.models.adapters import InitialLora, gather_virtual_tokens
from finetune.models.loader import ModelInfo
from finetune.models.quantization import is_packed_in_files
from finetune.run_dir.run_json import update_run_json
from finetune.training.compat import write_no_recovery_script
from finetune.training.evaluator import best_checkpoint
from finetune.training.nonfinite import check_weights
from finetune.utils.console import is_rank_0

# What is trained, where the saved adapter is made from it: PiSSA and OLoRA, virtual tokens of an encoder.
TRAINED_FILE = "trained_parameters.safetensors"


class CheckpointTrainer(Trainer):
    """The stock Trainer whose checkpoints are complete or none, on every rank's file system."""

    # Optional or wider in `Trainer`; never None here once training starts.
    model: PreTrainedModel
    model_wrapped: Any
    lr_scheduler: Any
    processing_class: PreTrainedTokenizerBase
    train_dataset: MicroBatchDataset

    def init_saver(
        self, identity: RunIdentity, keep: int | None, initial_lora: InitialLora | None, zero_stage: int | None
    ) -> None:
        """Check the parameters against the checkpoint to resume from, and prepare the saver. All ranks."""
        self.identity, self.initial_lora, self.loading = identity, initial_lora, ExitStack()
        self.base_tensors: BaseTensors | None = None
        self.output_dir = Path(str(self.args.output_dir))
        self.trained = trained_shapes(self.model)
        identity.check_trained(self.trained)
        share = len(identity.storage.ranks) / self.args.world_size
        size = checkpoint_bytes(
            self.model, self.trained, stage=zero_stage, share=share, only_model=self.args.save_only_model
        )
        key = key_of(identity.verify_key)
        self.saver = Saver(
            self.output_dir, identity.storage, keep, size, self.describe_step, key, resumed=identity.folder
        )

    def keep_base_tensors(self, base: ModelInfo) -> None:
        """Save what training leaves alone as the base has it, if the whole model is saved."""
        is_whole = not hasattr(self.model, "peft_config") and not is_packed_in_files(base.config)
        if is_whole and self.args.should_save and base.is_downloaded():
            self.base_tensors = BaseTensors(base.files, base.empty, self.model)

    def train_from_checkpoint(self) -> None:
        """Train from the verified checkpoint, if there is one; until the first step no other file is loaded."""
        folder, manifest = self.identity.folder, self.identity.manifest
        with self.loading:
            if folder is not None and manifest is not None:
                self.loading.enter_context(verified_loads(folder, manifest.files))
            self.train(resume_from_checkpoint=str(folder) if folder else None)

    @abstractmethod
    def describe_step(self, step: int) -> Manifest:
        """Return the manifest of a step without its files. All ranks."""

    @abstractmethod
    def resume_advice(self) -> str:
        """Return where the run can resume, and how."""

    @abstractmethod
    def after_pause(self, seconds: float) -> None:
        """Called after a save or an evaluation that took so long: it is not part of a step's seconds."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load as transformers does; a checkpoint of 0.1 with a schedule of DeepSpeed's has only its step."""
        if checkpoint is None or not self.is_deepspeed_enabled or Path(checkpoint, SCHEDULER_NAME).is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
        elif not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
            self.lr_scheduler.last_epoch = self.identity.manifest.step  # type: ignore[union-attr]

    def _load_best_model(self) -> None:
        """Load the checkpoint with the lowest held-out loss, verified as one to resume from."""
        folder = Path(str(self.state.best_model_checkpoint))
        with ExitStack() as loading:
            if is_complete(folder):
                manifest = read_manifest(folder, self.saver.key)
                loading.enter_context(verified_loads(folder, manifest.files))
            if self.is_deepspeed_enabled:
                super()._load_best_model()
            else:
                self._load_from_checkpoint(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights of a full model as `from_pretrained` does, without DeepSpeed.

        transformers (5.23) looks for the names in memory, and leaves a weight that the files name otherwise as it is.
        """
        if (trained := Path(resume_from_checkpoint, TRAINED_FILE)).is_file():
            self.model.load_state_dict(load_file(trained), strict=False)
            return
        if hasattr(self.model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        options: dict[str, Any] = {"config": self.model.config, "dtype": self.model.dtype}
        saved = type(self.model).from_pretrained(resume_from_checkpoint, **options)
        self.model.load_state_dict(saved.state_dict())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save, write the manifest, and only then remove an older checkpoint; an error is that of every rank."""
        began, step = time.perf_counter(), self.state.global_step
        check_weights(self.model, f"step {step}", self.resume_advice())
        folder = self.saver.begin(step, self.identity.run_id)
        if self.is_deepspeed_enabled:
            self.model_wrapped.checkpoint_engine = checkpoint_engine(self.saver)
            write_no_recovery_script(self.model_wrapped)
        with self.saver.collect_errors(folder):
            super()._save_checkpoint(model, trial)
        best = self.best()
        self.saver.commit(folder, step, keep_also=() if best is None else (best[0],))
        if is_rank_0():
            update_run_json(self.output_dir, {"last_checkpoint": step})
        self.after_pause(time.perf_counter() - began)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save as transformers does, with the tag that DeepSpeed looks for on each file system."""
        if not self.is_deepspeed_enabled:
            with self.saver.collect_errors(Path(output_dir)):
                super()._save_optimizer_and_scheduler(output_dir)
            return
        tag = f"global_step{self.model_wrapped.global_steps}"
        self.model_wrapped.save_checkpoint(
            output_dir, tag=tag, save_latest=False, exclude_frozen_parameters=hasattr(self.model, "peft_config")
        )
        with self.saver.collect_errors(Path(output_dir)):
            if self.args.should_save:
                Path(output_dir, "latest").write_text(tag, encoding="utf-8")
                if not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
                    torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _save_rng_state(self, output_dir: str) -> None:
        name = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        self.saver.record_written(Path(output_dir, name))
        with self.saver.collect_errors(Path(output_dir, name)):
            super()._save_rng_state(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the model and its tokenizer; no `training_args.bin`, a pickle: run.json has the arguments."""
        folder = Path(output_dir) if output_dir else self.output_dir
        with gather_virtual_tokens(self.model, saves=self.args.should_save), self.saver.collect_errors(folder):
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                if self.base_tensors is not None:
                    self.base_tensors.save(self.model, folder, state_dict)
                elif hasattr(self.model, "peft_config"):
                    # What is trained: peft's default adds frozen embeddings and heads that LoRA is on, but for ZeRO-3.
                    self.model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
                    Path(folder, "README.md").unlink(missing_ok=True)  # peft's card; the result gets its own
                else:
                    self.model.save_pretrained(folder, state_dict=state_dict)
                self.processing_class.save_pretrained(folder)
                config: Any = getattr(self.model, "active_peft_config", None)
                is_other = self.initial_lora is not None or (config is not None and config.is_prompt_learning)
                if is_other and folder != self.output_dir and not self.is_deepspeed_enabled:
                    trained = ((name, self.model.get_parameter(name)) for name in self.trained)
                    save_file({name: weight.detach().cpu() for name, weight in trained}, folder / TRAINED_FILE)
                if self.initial_lora is not None:
                    self.initial_lora.rewrite(folder)

    def save_result(self) -> None:
        """Save the trained model and the Trainer's state in `output_dir`; an error is that of every rank."""
        check_weights(self.model, "the result", self.resume_advice())
        with self.saver.saving_result():
            self.save_model()
            with self.saver.collect_errors(self.output_dir):
                self.save_state()

    def best(self) -> tuple[int, float] | None:
        """Return the step of the checkpoint with the lowest held-out loss, and that loss."""
        return best_checkpoint(self.state.log_history, steps_in(self.saver.output_dir))
