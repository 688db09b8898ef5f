"""Names of flags of LLaMA-Factory, axolotl, ms-swift and TRL, and what they are here.

In `foreign_names.json`, `renamed` has our flags, each with the names of others that mean the same; `otherwise` has
names of others with what to give here, where values differ too.
"""

import json
from pathlib import Path

_TABLES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
RENAMED: dict[str, list[str]] = _TABLES["renamed"]
OURS: dict[str, str] = {theirs: ours for ours, names in RENAMED.items() for theirs in names}
FOREIGN_NAMES: dict[str, str] = {
    **{theirs: f"here --{ours}" for theirs, ours in OURS.items()},
    **{theirs: f"here {said}" if said.startswith("--") else said for theirs, said in _TABLES["otherwise"].items()},
}
