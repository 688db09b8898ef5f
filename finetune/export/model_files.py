"""Write the files of a merged model: weights, config, tokenizer, generation config, code."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from finetune.chat_templates import ChatFormat, LingoWhaleFormat
from finetune.export.merge_plan import OutputTensor
from finetune.models.loader import add_eos_token, embedding_rows
from finetune.models.stored_tensors import save_tensors
from finetune.utils.user_files import read_json_object

# Files copied from the source: what the model needs to run, and licenses.
COPIED_FILES = ("*.py", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "*.tiktoken", "*processor_config.json")
# The LingoWhale format: a marker before each turn, the end token after each model turn.
LINGOWHALE_TEMPLATE = (
    "{%% set ns = namespace(system='') %%}{%% for message in messages %%}{%% if message['role'] == 'system' %%}"
    "{%% set ns.system = message['content'] + '\n\n' %%}{%% elif message['role'] == 'user' %%}"
    "{{ '%(human)s' + ns.system + message['content'] }}{%% set ns.system = '' %%}{%% else %%}"
    "{{ '%(model)s' + message['content'] }}{%% if loop.last %%}{{ '%(end)s' }}{%% endif %%}{%% endif %%}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '%(model)s' }}{%% endif %%}"
)
PROBE_ROLES = ("system", "user", "assistant", "user")


def write_weights(folder: Path, tensors: Sequence[OutputTensor], dtypes: Sequence[torch.dtype], limit: int) -> None:
    """Write tensors in these types, in files of at most `limit` bytes or one larger tensor, with a progress bar."""
    outputs = {tensor.name: (tensor, dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)}
    empty = {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, (tensor, dtype) in outputs.items()}
    shards = split_torch_state_dict_into_shards(empty, max_shard_size=limit)
    total = shards.metadata["total_size"]
    with tqdm(total=total, desc="merging", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for file_name, names in shards.filename_to_tensors.items():
            values = {}
            for name in names:
                tensor, dtype = outputs[name]
                values[name] = tensor.get().to(dtype)
                bar.update(empty[name].nbytes)
            save_tensors(values, folder / file_name)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": dict(sorted(shards.tensor_to_filename.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_config(folder: Path, source: Path, *, dtype: str, vocab_size: int, unties: bool) -> None:
    """Write the source's config.json with the type, vocabulary size and weight tying of the merged model."""
    config = read_json_object(source / "config.json")
    for inner in (config, *(value for key, value in config.items() if key == "text_config")):
        if inner.get("vocab_size", vocab_size) != vocab_size:
            names = {"vocab_size", "vocab_size_per_layer_input"} & inner.keys()
            inner.update(dict.fromkeys(names, vocab_size))
        if unties:
            inner["tie_word_embeddings"] = False
    config.pop("torch_dtype", None)
    config.pop("_name_or_path", None)
    config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_generation_config(folder: Path, source: Path, stop_token_id: int) -> None:
    """Write the source's generation config, with the stop token of the training added."""
    if (source / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(source)
    else:
        config = GenerationConfig(eos_token_id=read_json_object(source / "config.json").get("eos_token_id"))
    add_eos_token(config, stop_token_id)
    # Not `save_pretrained`, which refuses a temperature without sampling, as many base models have it.
    config.to_json_file(folder / "generation_config.json")


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat) -> str | None:
    """Write the tokenizer with the chat template of the training; return a note if the template is not expressible."""
    note = None
    if isinstance(chat_format, LingoWhaleFormat):
        template = lingowhale_template(tokenizer, chat_format)
        if template is None:
            note = "the markers of the LingoWhale format have no text form for a chat template: use `finetune chat`"
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return note


def lingowhale_template(tokenizer: PreTrainedTokenizerBase, chat_format: LingoWhaleFormat) -> str | None:
    """Return the format as a Jinja template; None if the text of its markers is not tokenized to them again."""
    names = {"human": chat_format.markers["human"], "model": chat_format.markers["model"], "end": [chat_format.end]}
    texts = {name: "".join(map(str, tokenizer.convert_ids_to_tokens(ids))) for name, ids in names.items()}
    if any("'" in text or "\\" in text for text in texts.values()):
        return None
    template = LINGOWHALE_TEMPLATE % texts
    ids = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in zip(PROBE_ROLES, "abcd", strict=True)],
        chat_template=template,
        add_generation_prompt=True,
        return_dict=False,
    )
    plain = chat_format.plain.encode_all(["a\n\nb", "c", "d"])
    human, answer = chat_format.markers["human"], chat_format.markers["model"]
    expected = [*human, *plain[0], *answer, *plain[1], *human, *plain[2], *answer]
    return template if list(ids) == expected else None


def copy_other_files(folder: Path, source: Path) -> None:
    """Copy files of the source that the model needs and that nothing else writes."""
    for pattern in COPIED_FILES:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def vocab_size_of(source: Path, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of embedding rows: that of the source, or as many as the tokenizer needs."""
    config = read_json_object(source / "config.json")
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 0
    return max(size, embedding_rows(tokenizer))
