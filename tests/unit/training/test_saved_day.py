"""A resumed run writes the date into its conversations that it wrote before."""

from dataclasses import replace
from datetime import date
from types import SimpleNamespace

from finetune import checkpoint
from finetune.training.resume_check import DAY, saved_day
from tests.helpers.checkpoint_files import MANIFEST, sealed


def test_the_date_is_that_of_the_checkpoint(tmp_path):
    folder = sealed(tmp_path, 4)
    config = SimpleNamespace(output_dir=tmp_path, resume_from="auto", verify_key=None)
    assert saved_day(config) is None
    checkpoint.write_manifest(folder, replace(MANIFEST, facts={DAY: "2026-11-28"}))
    assert saved_day(config) == date(2026, 11, 28)
    assert saved_day(SimpleNamespace(output_dir=tmp_path, resume_from=None, verify_key=None)) is None
