"""Everything beside the weights of a merged model: config, tokenizer, where generation ends, its own code, a card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.chat_templates import ChatFormat, LingoWhaleFormat
from finetune.inference.run_result import RunResult
from finetune.models.loader import add_eos_token, embedding_rows

# Beside the weights and what is written anew: what a model needs to run, and what its owners ask to be passed on.
PASSED_ON = ("*.py", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "*.tiktoken", "preprocessor_config.json")
# The LingoWhale format as a Jinja template: a marker before each turn, the end token after each model turn.
LINGOWHALE_TEMPLATE = (
    "{%% set ns = namespace(system='') %%}{%% for message in messages %%}{%% if message['role'] == 'system' %%}"
    "{%% set ns.system = message['content'] + '\n\n' %%}{%% elif message['role'] == 'user' %%}"
    "{{ '%(human)s' + ns.system + message['content'] }}{%% set ns.system = '' %%}{%% else %%}"
    "{{ '%(model)s' + message['content'] }}{%% if loop.last %%}{{ '%(end)s' }}{%% endif %%}{%% endif %%}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '%(model)s' }}{%% endif %%}"
)
PROBE = ({"role": "system", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"},
         {"role": "user", "content": "d"})  # fmt: skip


def write_config(folder: Path, source: Path, *, dtype: str, rows: int, unties: bool) -> None:
    """config.json of the source, with what the merge has changed: type, size of the vocabulary, tied or not."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for inner in (config, *(value for key, value in config.items() if key == "text_config")):
        if "vocab_size" in inner:
            inner["vocab_size"] = rows
        if unties:
            inner["tie_word_embeddings"] = False
    config.pop("torch_dtype", None)
    config.pop("_name_or_path", None)
    config["dtype"] = dtype
    _write_json(folder / "config.json", config)


def write_generation_config(folder: Path, source: Path, stop_token_id: int) -> None:
    """The source's, which also ends where training taught the model to end."""
    from transformers import GenerationConfig

    known = (source / "generation_config.json").is_file()
    found = GenerationConfig.from_pretrained(source) if known else GenerationConfig()
    if not known:
        found.eos_token_id = json.loads((source / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
    add_eos_token(found, stop_token_id)
    # Not `save_pretrained`, which refuses what many bases have: a temperature, and no word of sampling.
    found.to_json_file(folder / "generation_config.json")


def write_tokenizer(folder: Path, tokenizer: Any, chat_format: ChatFormat) -> str | None:
    """The tokenizer with the chat template of the training; a line where that cannot be written as one."""
    note = None
    if isinstance(chat_format, LingoWhaleFormat):
        template = lingowhale_template(tokenizer, chat_format)
        if template is None:
            note = "the markers of the LingoWhale format cannot be spelled in a chat template: render with `finetune`"
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return note


def lingowhale_template(tokenizer: Any, chat_format: LingoWhaleFormat) -> str | None:
    """The format as a Jinja template, where its markers have a spelling that becomes them again."""
    names = {"human": chat_format.markers["human"], "model": chat_format.markers["model"], "end": [chat_format.end]}
    spelled = {name: "".join(map(str, tokenizer.convert_ids_to_tokens(ids))) for name, ids in names.items()}
    if any("'" in text or "\\" in text for text in spelled.values()):
        return None
    template = LINGOWHALE_TEMPLATE % spelled
    ids = tokenizer.apply_chat_template(
        list(PROBE), chat_template=template, add_generation_prompt=True, return_dict=False
    )
    plain = chat_format.plain.encode_all(["a\n\nb", "c", "d"])
    human, answer = chat_format.markers["human"], chat_format.markers["model"]
    expected = [*human, *plain[0], *answer, *plain[1], *human, *plain[2], *answer]
    return template if list(ids) == expected else None


def pass_on(folder: Path, source: Path) -> None:
    """Files of the source that belong to the model and that nothing else writes."""
    for pattern in PASSED_ON:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def rows_of(source: Path, tokenizer: Any) -> int:
    """Rows of the embeddings: the source's, or as many as the tokenizer needs."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    known = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 0
    return max(known, embedding_rows(tokenizer))


def write_card(folder: Path, result: RunResult, facts: Sequence[tuple[str, str]]) -> None:
    """README.md: a model card (https://huggingface.co/docs/hub/model-cards) with the facts of the run."""
    base = result.base["name"]
    is_on_hub = result.base["folder"] is None
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"base_model: {json.dumps(base)}", "base_model_relation: finetune"] if is_on_hub else []
    front += ["tags:", "- conversational", "- sft", "- deepspeed", *(["- lora"] if result.adapter else []), "---"]
    name = base.rstrip("/").rpartition("/")[2]
    rows = [f"| {label} | {_cell(value)} |" for label, value in facts]
    text = [
        *front, "", f"# {name}, fine-tuned", "",
        f"[{base}](https://huggingface.co/{base})" if is_on_hub else f"`{base}`",
        "trained on conversations; the loss is taken at the model's turns alone, with the token that ends each.", "",
        "| | |", "| --- | --- |", *rows, "", "## Use", "",
        "```python", "from transformers import pipeline", "",
        'chat = pipeline("text-generation", model="FOLDER")',
        'print(chat([{"role": "user", "content": "..."}])[0]["generated_text"][-1]["content"])', "```", "",
        "`run.json` beside this page holds all arguments, versions and fingerprints of the run.", "",
    ]  # fmt: skip
    (folder / "README.md").write_text("\n".join(text), encoding="utf-8")


def card_facts(result: RunResult) -> list[tuple[str, str]]:
    """What a reader of the card wants to know about the run."""
    run, arguments = result.run, result.run["arguments"]
    data = run["data"]["summary"]
    zero = (run.get("deepspeed") or {}).get("zero_optimization", {}).get("stage")
    facts = {
        "Trained": f"{result.adapter.lower()} adapter, merged" if result.adapter else "all parameters",
        "Data": f"{data['rows']:,} conversations, {data['tokens']:,} tokens, {data['supervised_tokens']:,} learned",
        "Fingerprint of the data": run["data"]["fingerprint"],
        "Fingerprint of the base's weights": result.base["weights"] or result.base["fingerprint"],
        "Chat format": result.chat["format"],
        "Steps": f"{run['result']['steps']:,}" if "result" in run else None,
        "Loss": "{first_loss:.4f} -> {last_loss:.4f}".format(**run["result"])
        if "last_loss" in run.get("result", {})
        else None,
        "Precision": result.precision,
        "Ranks": f"{run['world_size']}" + (f", ZeRO stage {zero}" if zero else ""),
        "Learning rate": arguments.get("learning_rate"),
        "Longest conversation": f"{arguments.get('model_max_length', 'default')} tokens",
        "Libraries": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    }
    return [(label, str(value)) for label, value in facts.items() if value is not None]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
