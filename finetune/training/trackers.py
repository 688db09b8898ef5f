"""Check that the trackers of `--report_to` are installed before the run starts; else name the install line."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from finetune.utils.errors import ConfigError

# By transformers' name: what to install, and any of the modules that show that it is.
PACKAGES = {
    "azure_ml": ("azureml-core", ("azureml",)),
    "clearml": ("clearml", ("clearml",)),
    "codecarbon": ("codecarbon", ("codecarbon",)),
    "comet_ml": ("comet-ml", ("comet_ml",)),
    "dagshub": ("dagshub", ("dagshub",)),
    "dvclive": ("dvclive", ("dvclive",)),
    "flyte": ("flytekit", ("flytekit",)),
    "kubeflow": ("kubeflow", ("kubeflow",)),
    "mlflow": ("mlflow", ("mlflow",)),
    "neptune": ("neptune", ("neptune",)),
    "swanlab": ("swanlab", ("swanlab",)),
    "tensorboard": ("tensorboard", ("tensorboard", "tensorboardX")),
    "trackio": ("trackio", ("trackio",)),
    "wandb": ("wandb", ("wandb",)),
}
EVERY_ONE, NONE = "all", "none"


def check_trackers(asked: Sequence[str]) -> None:
    """Find each tracker without importing it.

    Raises:
        ConfigError: a name that is none; one that is not installed, with the line that installs it.
    """
    for name in asked:
        if name in (EVERY_ONE, NONE):
            continue
        if name not in PACKAGES:
            raise ConfigError(f"--report_to {name}: expected none, all or some of {', '.join(PACKAGES)}")
        package, modules = PACKAGES[name]
        if not any(importlib.util.find_spec(module) for module in modules):
            raise ConfigError(f"--report_to {name}: it is not installed: pip install {package}")
