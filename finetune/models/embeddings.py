"""The modules of a model with a row per token: its embeddings and its head."""

from typing import Any

from finetune.models.module_kinds import full_shape, output_embeddings
from finetune.utils.errors import ConfigError


def embedding_names(model: Any, *, with_head: bool = False) -> list[str]:
    """Return the last part of the names of the modules with a row per token: embeddings and, unless tied, the head."""
    has_head = with_head or not is_tied(model)
    wanted = [model.get_input_embeddings()] + ([output_embeddings(model)] if has_head else [])
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None):  # Gemma 3n and 4
        wanted.append(model.get_per_layer_input_embeddings())
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    return [names[id(module)] for module in wanted if module is not None]


def is_tied(model: Any) -> bool:
    """Whether embeddings and head are one weight."""
    return bool(getattr(model.config, "tie_word_embeddings", False))  # that of the text model decides nothing


def check_token_ids(model: Any, options: dict[str, Any]) -> None:
    """Check that the tokens whose rows alone these options of peft train have one.

    Raises:
        ConfigError: Naming the tokens; peft fails on them once the weights are loaded.
    """
    of_lora = "trainable_token_indices"
    field = "token_indices" if options["peft_type"] == "TRAINABLE_TOKENS" else of_lora
    wanted = options.get(field)
    if wanted is None and field == of_lora:
        return
    names, rows = embedding_names(model, with_head=True), full_shape(model.get_input_embeddings().weight)[0]
    for name, ids in (wanted if isinstance(wanted, dict) else {names[0]: wanted}).items():
        if name not in names:
            raise ConfigError(f"--adapter_config: {field} of {name}: expected {' or '.join(names)}")
        wrong = [token for token in ids if token not in range(rows)] if isinstance(ids, list) else [ids]
        if wrong or not ids:
            raise ConfigError(
                f"--adapter_config: {field} {wrong}: expected ids from 0 to {rows - 1}: {name} has {rows:,} rows. "
                "To train tokens that the vocabulary lacks, give their text as --new_tokens"
            )
