"""What pyproject.toml cannot express: the list of packages, and the README as a package index shows it."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

README = (Path(__file__).resolve().parent / "README.md").read_text(encoding="utf-8")

setup(
    packages=[
        *find_namespace_packages(include=["finetune", "finetune.*"], exclude=["*.__pycache__", "*.__pycache__.*"]),
        "finetune.data",
        "finetune.ds_configs",
        "finetune.recipes",
    ],
    # A package index shows the README without the files beside it: a link to one of them becomes its text.
    long_description=re.sub(r"!?\[([^]]+)\]\((?!https?:|#)[^)]+\)", r"\1", README),
    long_description_content_type="text/markdown",
)
