"""The model card of a result : the facts of its run, and no row of the data.

https://huggingface.co/docs/hub/model-cards
"""

import json
import re
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import hf_hub_download

from finetune.config.arguments import default_of
from finetune.inference.run_result import RunResult
from finetune.models.model_folder import local_model_dir
from finetune.utils.atomic_io import write_text_atomically
from finetune.utils.hub import hub_errors

CARD = "README.md"
IN_CACHE = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")  # a folder of the hub's cache
# Flags that say where something is, and not how the model was trained.
PLACES = ("model_name_or_path", "adapter_name_or_path", "data_path", "eval_data_path", "output_dir", "data_cache_dir",
          "run_name", "project", "report_to", "logging_dir", "resume_from_checkpoint")  # fmt: skip
LICENSE_KEYS = ("license", "license_name", "license_link")
USE_MERGED = """\
```python
from transformers import pipeline

chat = pipeline("text-generation", model="FOLDER")
print(chat([{"role": "user", "content": "..."}])[0]["generated_text"][-1]["content"])
```"""
USE_ADAPTER = """\
```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model, tokenizer = AutoPeftModelForCausalLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
```"""
# The class above would take the text model alone of a base that reads images, too.
USE_ADAPTER_OF_ALL = """\
```python
from peft import PeftConfig, PeftModel
from transformers import AUTO_CLASS, AutoTokenizer

base = AUTO_CLASS.from_pretrained(PeftConfig.from_pretrained("FOLDER").base_model_name_or_path)
model, tokenizer = PeftModel.from_pretrained(base, "FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
```"""


def write_model_card(result: RunResult, *, merges: bool = False) -> None:
    """Write README.md into the folder of a result, in place of peft's; `merges`: its adapter is part of the weights."""
    write_text_atomically(result.folder / CARD, model_card(result, merges=merges))


def model_card(result: RunResult, *, merges: bool = False) -> str:
    """Return the text of a model card."""
    base, is_on_hub = base_name(result.base)
    is_adapter = result.adapter is not None and not merges
    auto_class, use = result.base.get("auto_class", "AutoModelForCausalLM"), USE_ADAPTER if is_adapter else USE_MERGED
    if is_adapter and auto_class != "AutoModelForCausalLM":
        use = USE_ADAPTER_OF_ALL.replace("AUTO_CLASS", auto_class)
    front: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers",
                             "pipeline_tag": "text-generation"}  # fmt: skip
    if is_on_hub:
        front |= {"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"}
    front |= base_license(result)
    front["tags"] = ["conversational", "sft", "deepspeed", *(["lora"] if result.adapter == "LORA" else [])]
    flags = {name: shown(value) for name, value in result.run["arguments"].items()
             if name not in PLACES and value not in (default_of(name), None)}  # fmt: skip
    facts = "\n".join(f"| {label} | {' '.join(value.replace('|', chr(92) + '|').split())} |"
                      for label, value in _facts(result, merges=merges))  # fmt: skip
    return "\n".join([
        "---", _yaml(front) + "---", "", f"# {base.rpartition('/')[2]}, fine-tuned", "",
        f"[{base}](https://huggingface.co/{base})" if is_on_hub else f"`{base}`",
        "trained on conversations; only model turns and their end-of-turn tokens are supervised.", "",
        "| | |", "| --- | --- |", facts, "", "## Flags", "", "Others have their defaults.", "",
        f"```yaml\n{_yaml(flags)}```", "", "## Use", "", use, "",
        "`run.json` in this folder holds all arguments, versions and fingerprints of the run.", "",
    ])  # fmt: skip


def base_name(base: dict[str, Any]) -> tuple[str, bool]:
    """Return the name of a base without its local folder, and whether that is its name on the hub."""
    folder = base["folder"]
    in_cache = IN_CACHE.search(f"{folder}/") if folder else None
    if in_cache:
        return "/".join(in_cache.groups()), True
    return (str(shown(folder)), False) if folder else (base["name"], True)


def shown(value: Any) -> Any:
    """Return a value without the folders in which files of this machine lie."""
    if isinstance(value, dict):
        return {shown(key): shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shown(item) for item in value]
    is_path = isinstance(value, str) and value.startswith(("/", "~", "./", "../")) and "\n" not in value
    return PurePath(value).name if is_path else value


def base_license(result: RunResult) -> dict[str, str]:
    """Return what the card of the base says of its license; empty where that is not known."""
    name, revision = result.base["name"], result.base["revision"]
    folder = Path(result.base["folder"] or local_model_dir(name, revision))
    path = folder / CARD
    if result.base["folder"] is None and not path.is_file():
        try:
            path = Path(hf_hub_download(name, CARD, revision=revision))
        except hub_errors():  # no network, or no card
            return {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        values = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        return {}
    known = values if isinstance(values, dict) else {}
    return {key: known[key] for key in LICENSE_KEYS if isinstance(known.get(key), str)}


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True) if values else ""


def _facts(result: RunResult, *, merges: bool) -> list[tuple[str, str]]:
    """Return the rows of the card's table."""
    run, summary, outcome = result.run, result.run["data"]["summary"], result.run.get("result", {})
    kwargs, rows = result.chat.get("template_kwargs"), f"{summary.get('with_reasoning', 0):,} conversations"
    treated = {"learn": "supervised", "context": "read, not supervised", "drop": "left out"}
    zero = (run.get("deepspeed") or {}).get("zero_optimization", {}).get("stage")
    sources = summary.get("rows_by_source", {})

    def change(name: str) -> str | None:
        return f"{outcome[f'first_{name}']:.4f} -> {outcome[f'last_{name}']:.4f}" if f"last_{name}" in outcome else None

    facts = {
        "Trained": f"{result.adapter.lower()} adapter{', merged' * merges}" if result.adapter else "all parameters",
        "Data": ", ".join(f"{shown(name)} ({count:,} rows)" for name, count in sources.items()) or None,
        "Conversations": f"{summary['rows']:,}, {summary['tokens']:,} tokens, {summary['supervised_tokens']:,} "
        "supervised",
        "Reasoning": f"{treated[result.chat.get('reasoning', 'learn')]} in {rows} with reasoning"
        if summary.get("with_reasoning")
        else None,
        "Chat format": result.chat["format"],
        "Chat template variables": f"`{json.dumps(kwargs, ensure_ascii=False)}`" if kwargs else None,
        "Steps": f"{outcome['steps']:,}" if "steps" in outcome else None,
        "Loss": change("loss"),
        "Held-out loss": change("eval_loss"),
        "Precision": result.precision,
        "Ranks": f"{run['world_size']}" + (f", ZeRO stage {zero}" if zero else ""),
        "Data fingerprint": run["data"]["fingerprint"],
        "Base weights fingerprint": result.base["weights"] or result.base["fingerprint"],
        "Libraries": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    }
    return [(label, str(value)) for label, value in facts.items() if value is not None]
