"""Packaging. The configs and the sample data lie at the top of a clone and inside the package once installed."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
# Every folder with code in it, so that a new one cannot be forgotten.
PACKAGES = sorted({".".join(file.parent.relative_to(HERE).parts) for file in (HERE / "finetune").rglob("*.py")})
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
    version="0.1.0.dev0",
    description="Supervised fine-tuning of chat language models with DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
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
        "jinja2>=3.1",
        "numpy>=2",
        "pyarrow>=17",
        "sentencepiece>=0.2",
        "ninja>=1.11",
        "plotext>=5.3,<6",
        "plotly>=6,<8",
        "protobuf>=5",
        "PyYAML>=6",
        "rich>=13",
        "tqdm>=4.66",
        "tokenizers>=0.22",
        "typer>=0.15",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["finetune = finetune.__main__:main"]},
)
