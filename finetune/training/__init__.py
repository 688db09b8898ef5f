"""Training: the Trainer, its callbacks, loss, metrics, evaluation during training, and the end of a run."""
