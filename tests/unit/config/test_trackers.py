"""Trackers: one that is missing is told before anything starts; TensorBoard's files hold what was logged."""

from __future__ import annotations

import importlib.util

import pytest

from finetune.config import resolve
from finetune.config.resolve import TRACKERS, check_trackers
from finetune.utils.errors import ConfigError


def test_the_names_are_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(TRACKERS) == set(INTEGRATION_TO_CALLBACK)


def test_one_that_is_missing_is_told_with_the_line_that_installs_it(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(resolve, "find_spec", lambda name: None if name == "comet_ml" else there(name))
    check_trackers(["none"])
    check_trackers(["tensorboard", "all"])
    with pytest.raises(ConfigError, match="--report_to comet_ml: it is not installed: pip install comet-ml"):
        check_trackers(["tensorboard", "comet_ml"])
    with pytest.raises(ConfigError, match="--report_to wandbb: expected none, all or some of azure_ml, clearml"):
        check_trackers(["wandbb"])
