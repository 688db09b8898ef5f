"""Schedule-free optimizers: what is evaluated and saved are the averaged weights, not those that a step trains."""

from types import SimpleNamespace

from transformers import Trainer, TrainerControl

from finetune.training.trainer import SupervisedTrainer


def test_weights_are_averaged_before_they_are_evaluated_or_saved_and_at_the_end(monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(Trainer, "_maybe_log_save_evaluate", lambda *_, **__: calls.append("written"))
    trainer = object.__new__(SupervisedTrainer)
    trainer.optimizer = SimpleNamespace(eval=lambda: calls.append("averaged"))
    for flag in ("should_evaluate", "should_save", "should_training_stop"):
        trainer.control = TrainerControl(**{flag: True})
        trainer._maybe_log_save_evaluate()
    assert calls == ["averaged", "written"] * 3
    trainer.control = TrainerControl(should_log=True)
    trainer._maybe_log_save_evaluate()
    assert calls[6:] == ["written"]
