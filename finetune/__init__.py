"""Supervised fine-tuning of chat language models with DeepSpeed.

The command line is `finetune` and `deepspeed finetune/finetune.py`; these functions are the same from Python. Importing
this package is instant: each function imports what it needs when it is called.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.chat_templates.example import RenderedConversation
    from finetune.chat_templates.renderer import TooLong, TrainOn
    from finetune.conversation import Conversation
    from finetune.inference.load_result import LoadedModel

    def train(**flags: Any) -> Path:
        """Train in this process, and return the output_dir.

        >>> output_dir = train(
        ...     model_name_or_path=".models/SmolLM2-135M-Instruct",
        ...     data_path="data/identity.json",
        ...     output_dir="output",
        ...     use_lora=True,
        ... )  # doctest: +SKIP

        Several GPUs or machines need the launcher: `finetune train`.

        Args:
            flags: those of the command line, by name; lists for flags that take several values.

        Raises:
            FinetuneError: as the command line, without exiting.
        """


__version__ = "0.2.0"
__all__ = ["load_for_inference", "read_conversations", "render", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        return import_module("finetune.train")  # can be called
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def read_conversations(
    paths: str | Path | Sequence[str | Path], *, repairs: Collection[str] = ()
) -> list[Conversation]:
    """Read and check files, folders or data sets, as `--data_path` names them.

    >>> conversations = read_conversations("data/identity.json")
    >>> len(conversations)
    130
    >>> [(turn.role, turn.text) for turn in conversations[0].turns]
    [('human', 'Who are you?'), ('model', 'I am Nori, an assistant made by Tidepool.')]

    Args:
        paths: one or several of them.
        repairs: rules that may change rows, as `--repairs` names them.

    Raises:
        DataError: a source that cannot be found, or all faults of its rows.
    """
    from finetune.dataset import conversation_reader

    return conversation_reader.read_conversations(paths, repairs=repairs)


def render(
    conversations: Iterable[Conversation],
    tokenizer: Any,
    *,
    max_length: int = 2048,
    chat_template: str | None = None,
    too_long: TooLong = "turns",
    train_on: TrainOn = "model_turns",
) -> list[RenderedConversation]:
    """Render conversations to `input_ids` and `labels`, exactly as training does.

    >>> from transformers import AutoTokenizer
    >>> tokenizer = AutoTokenizer.from_pretrained(".models/SmolLM2-135M-Instruct")
    >>> rendered = render(read_conversations("data/identity.json"), tokenizer)
    >>> example = rendered[0].examples[0]
    >>> tokenizer.decode([label for label in example.labels if label != -100])
    'I am Nori, an assistant made by Tidepool.<|im_end|>'

    Args:
        tokenizer: a fast tokenizer of transformers. Markers of `chatml` are added to one that lacks them.
        max_length: tokens of the longest example; `too_long` says what becomes of a longer conversation.
        chat_template: `lingowhale`, `chatml` or a Jinja file; default: the tokenizer's own.
        too_long: as `--too_long`.
        train_on: as `--train_on`.

    Raises:
        DataError: every conversation that the template cannot express.
    """
    from finetune.chat_templates import Renderer, select_chat_format
    from finetune.conversation import BadRow
    from finetune.utils.errors import DataError, raise_faults

    chat_format, _ = select_chat_format(tokenizer, chat_template)
    renderer = Renderer(chat_format, max_length, too_long=too_long, train_on=train_on)
    rows = renderer.render_all(list(conversations))
    raise_faults((fault for row in rows if isinstance(row, BadRow) for fault in row.faults), DataError)
    return [row for row in rows if not isinstance(row, BadRow)]


def load_for_inference(
    output_dir: str | Path, *, base_model: str | None = None, trust_remote_code: bool = False
) -> LoadedModel:
    """Load what a training run has left: the trained model, its tokenizer and chat template.

    >>> loaded = load_for_inference("output")  # doctest: +SKIP
    >>> messages = [{"role": "user", "content": "Who are you?"}]  # doctest: +SKIP
    >>> inputs = loaded.tokenizer.apply_chat_template(
    ...     messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ... )  # doctest: +SKIP
    >>> loaded.tuned.generate(**inputs)  # doctest: +SKIP

    Args:
        output_dir: of a run, or a checkpoint in one.
        base_model: where the base model of an adapter is now; default: where it was during training.
        trust_remote_code: whether Python files of the model or its base may run.

    Raises:
        ConfigError: the folder holds no result, or the base is not there any more.
        CheckpointError: files are missing or damaged, or the base is another model.
    """
    from finetune.inference.load_result import load_for_inference as load
    from finetune.inference.run_result import read_result

    return load(read_result(Path(output_dir), trust_remote_code=trust_remote_code), base_name=base_model)
