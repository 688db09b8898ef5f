"""`finetune chat`: talk with a result in a terminal, from a pipe or in a browser, beside its base if wanted."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from finetune.checkpoint import step_of
from finetune.config import DataArguments
from finetune.config.argument_parser import data_faults
from finetune.config.arguments import VERIFY_KEY_HELP
from finetune.dataset.tool_checks import check_tools
from finetune.dataset.tool_reading import ToolFault, read_tools
from finetune.inference import ChatModels, ChatSession, TerminalChat, answer_once, check_gradio, read_question, serve
from finetune.inference.generate import SamplingParams
from finetune.inference.load_result import BASE, TUNED, load_for_inference, read_model
from finetune.inference.run_result import TRUST_HELP, RunResult, read_result
from finetune.run_dir.run_json import RUN_FILE, holds_model
from finetune.utils.console import accept_all_characters, configure_logging, quiet_serving
from finetune.utils.errors import ConfigError, raise_faults
from finetune.utils.options import CommandParser, fill, option, positional
from finetune.utils.user_files import read_json
from finetune.utils.web_requests import port_faults

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatOptions:
    """Talk with a result: in a terminal, from a pipe, or in a browser (--web)."""

    output: str = positional("OUTPUT", "an output_dir, a checkpoint in one, a merged model, or any chat model")
    base: bool = option(False, "the base model answers, as it was before the training")
    compare: bool = option(False, "both answer; the answers of the tuned model are kept")
    base_model: str | None = option(None, "where the base model is now; default: where it was")
    system: str | None = option(None, "a system turn in front of the conversation")
    tools: str | None = option(None, "a JSON file with declarations of tools that the model may call")
    chat_template_kwargs: str | None = option(
        None, "variables for the chat template as JSON; default: those of the training"
    )
    max_new_tokens: int = option(512, "most tokens of an answer")
    temperature: float = option(0.0, "0: greedy, the most probable token each time")
    top_p: float = option(1.0, "sample from the most probable tokens that make up this share")
    seed: int | None = option(None, "makes sampled answers repeatable")
    trust_remote_code: bool = option(False, TRUST_HELP)
    verify_key: str | None = option(None, VERIFY_KEY_HELP)
    json: bool = option(False, "from a pipe: print the answer as JSON")
    web: bool = option(False, "open a page for the browser instead (the extra `web`: Gradio)")
    host: str = option("127.0.0.1", "address that the page listens on; only this machine sees the default")
    port: int = option(7860, "port of the page")

    @property
    def names(self) -> tuple[str, ...]:
        """The models that answer."""
        return (BASE,) if self.base else (TUNED, BASE) if self.compare else (TUNED,)


build_parser = partial(CommandParser, "finetune chat", "OUTPUT [--compare] [--web] ...", ChatOptions)


def main(argv: Sequence[str]) -> None:
    """Load the result and start the conversation: in the terminal, from the pipe, or in the browser."""
    # Threads that wait for each other must not occupy the cores that other threads need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = fill(ChatOptions, build_parser().parse(argv))
    raise_faults(_faults(options))
    configure_logging(to_stderr=True)
    accept_all_characters(utf8=options.json)
    tools = _read_tools(options.tools) if options.tools else ()
    result = _read(options).with_template_kwargs(options.chat_template_kwargs)
    if result.adapter is not None or options.base or options.compare:
        result.base_path(options.base_model)
    question = None if options.web or _is_typed() else read_question(sys.stdin)
    if options.web:
        check_gradio()
    with _loading(options.output):
        quiet_serving()
        loaded = load_for_inference(result, base_name=options.base_model, only_base=options.base)
    models = ChatModels(loaded, options.names, fill(SamplingParams, vars(options)))
    chat = ChatSession(options.system, tools)
    if options.web:
        serve(models, chat, host=options.host, port=options.port)
    elif question is not None:
        answer_once(models, chat, question, as_json=options.json)
    else:
        TerminalChat(models, chat, Console(highlight=False)).run()


def _faults(options: ChatOptions) -> Iterator[str]:
    if options.base and options.compare:
        yield "--base answers with the base alone, --compare with both: keep one of them"
    if options.json and (options.web or _is_typed()):
        yield "--json is for a question from a pipe: echo '...' | finetune chat OUTPUT --json"
    yield from port_faults(options.port, least=1)
    yield from data_faults(DataArguments(chat_template_kwargs=options.chat_template_kwargs))
    yield from fill(SamplingParams, vars(options)).faults()
    if options.system is not None and not options.system.strip():
        yield "--system: is empty: leave the flag out"


def _read_tools(name: str) -> tuple[Mapping[str, Any], ...]:
    """The declarations in a file: OpenAI's form, or the functions alone."""
    path = Path(name).expanduser()
    value = read_json(path, f"--tools {path}")
    try:
        tools = read_tools(value if isinstance(value, list) else [value])
    except ToolFault as fault:
        raise ConfigError(f"--tools {path}: {fault}") from None
    _, faults = check_tools((), tools, f"--tools {path}")
    raise_faults(faults)
    return tools


def _is_typed() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _read(options: ChatOptions) -> RunResult:
    """Return what the folder holds; a model without run.json uses its own chat template."""
    folder = Path(options.output).expanduser()
    output_dir = folder.absolute().parent if step_of(folder.absolute()) is not None else folder
    has_run = (folder / RUN_FILE).is_file() or (output_dir / RUN_FILE).is_file()
    if folder.is_dir() and not has_run and not holds_model(folder):
        raise ConfigError(f"{folder}: holds no {RUN_FILE} and no model: give the output_dir of a run, or a chat model")
    if has_run or options.verify_key or not folder.is_dir():
        return read_result(folder, trust_remote_code=options.trust_remote_code, verify_key=options.verify_key)
    if options.base or options.compare or options.base_model:
        raise ConfigError(f"{folder}: has no {RUN_FILE}: which base it was trained from is not known: leave --base out")
    return read_model(folder, trust_remote_code=options.trust_remote_code)


@contextmanager
def _loading(output: str) -> Iterator[None]:
    """Show a line on stderr while the model loads; on a terminal it is removed afterwards."""
    console = Console(stderr=True)
    if not console.is_terminal:
        logger.info(f"loading {output}")
        yield
        return
    with console.status(f"loading {escape(output)} ..."):
        yield
