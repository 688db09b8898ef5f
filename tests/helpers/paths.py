"""Where things lie in a clone."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRETRAINED = ROOT / ".models" / "SmolLM2-135M-Instruct"
TOKENIZERS = ROOT / ".models" / "tokenizers"
