"""Packaging. The configs and the sample data lie at the top of a clone and inside the package once installed."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
# Every folder with code in it, so that a new one cannot be forgotten.
PACKAGES = sorted({".".join(file.parent.relative_to(HERE).parts) for file in (HERE / "finetune").rglob("*.py")})
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "finetune" / "__init__.py").read_text(encoding="utf-8"))[1]
# A package index shows the README without the files beside it: what a link to one of them says stays, as text.
README = re.sub(r"\[([^]]+)\]\((?!https?:|#)[^)]+\)", r"\1", (HERE / "README.md").read_text(encoding="utf-8"))
EXTRAS = {
    "evaluate": ["lm_eval>=0.4.13,<0.5"],
    "flash-attn": ["flash-attn>=2.6"],
    "gguf": ["gguf>=0.19"],
    "modelscope": ["modelscope>=1.18"],
    "web": ["gradio>=6.31,<7"],
    "test": [
        "pytest>=8",
        "hypothesis>=6.100",
        "gguf>=0.19",
        "lm_eval>=0.4.13,<0.5",
        "playwright>=1.50",
        "gradio>=6.31,<7",
        "tensorboard>=2.16",
    ],
}
EXTRAS["dev"] = [*EXTRAS["test"], "ruff>=0.14"]

setup(
    name="finetune",
    version=VERSION,
    description="Supervised fine-tuning of chat language models with DeepSpeed",
    long_description=README,
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Natural Language :: Chinese (Simplified)",
        "Natural Language :: English",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=[*PACKAGES, "finetune.ds_configs", "finetune.data"],
    package_dir={"finetune": "finetune", "finetune.ds_configs": "ds_configs", "finetune.data": "data"},
    package_data={
        "finetune": ["*.json"],
        "finetune.report": ["*.html", "*.css", "*.js"],
        "finetune.evaluation.tasks": ["*.yaml"],
        "finetune.ds_configs": ["*.json"],
        "finetune.data": ["*.json"],
    },
    install_requires=[
        "torch>=2.10",
        "transformers>=5.23,<6",
        "deepspeed>=0.19.8,<0.20",
        "accelerate>=1.15",
        "peft>=0.21,<0.22",
        "datasets>=4",
        "filelock>=3.12",
        "huggingface_hub>=1.31",
        "jinja2>=3.1.6",
        "ninja>=1.11.1",
        "numpy>=2",
        "plotext>=5.3.2,<6",
        "plotly>=6,<8",
        "protobuf>=5.26",  # with sentencepiece: tokenizers that come as a tokenizer.model
        "psutil>=6",
        "pyarrow>=17",
        "PyYAML>=6.0.1",
        "rich>=13.8",
        "safetensors>=0.8",
        "sentencepiece>=0.2",
        "tokenizers>=0.23.1",
        "tqdm>=4.66.3",
        "typer>=0.29",
        "xxhash>=3.4",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["finetune = finetune.__main__:main"]},
)
