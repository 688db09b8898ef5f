"""The verbs of `finetune`, one file each with a `main(argv)`; they never import each other.

The file of a verb is imported when that verb runs, so `finetune --help` waits for none of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import finetune
from finetune.utils.errors import ConfigError
from finetune.utils.options import CommandParser, one_of

VERBS = {
    "chat": "talk with a result: in a terminal, from a pipe, or in a browser",
    "convert": "write conversations in any supported layout as one JSON file",
    "doctor": "check whether a training command will run and fit, on all its hosts",
    "evaluate": "measure a result beside its base: held-out loss, benchmarks, forgetting",
    "launch": "start training as the deepspeed command does, and supervise it",
    "merge": "merge an adapter, or a ZeRO checkpoint, into a plain model",
    "preview": "show what the rows of a data file render to",
    "quickstart": "fine-tune a small model and ask it who it is, before and after",
    "report": "write what one or several runs did as one HTML page",
}
EPILOG = "Train with: finetune launch finetune/finetune.py --help. `finetune VERB --help` lists the flags of a verb."


def main(argv: Sequence[str]) -> None:
    """Run `finetune VERB ...`; raises what the verb raises, and `ConfigError` for an unknown verb or flag."""
    is_value = [False, *(word == "--completion" for word in argv)]
    place = next((i for i, word in enumerate(argv) if not word.startswith("-") and not is_value[i]), len(argv))
    # the `deepspeed` launcher puts it in front of the verb; RANK and LOCAL_RANK say the same
    words = [word for word in argv[:place] if not word.startswith("--local_rank=")]
    parser = build_parser()
    if not argv:
        parser.print_help()
        parser.exit(2)
    parser.parse(words)
    if place == len(argv):
        raise ConfigError(f"no command: expected {one_of(tuple(VERBS))}")
    verb = argv[place]
    if verb not in VERBS:
        close = get_close_matches(verb, VERBS, n=1)
        raise ConfigError(f"unknown command {verb}: " + (f"did you mean {close[0]}?" if close else "see --help"))
    import_module(f"finetune.cli.{verb}").main(argv[place + 1 :])


def build_parser() -> CommandParser:
    """Build the parser of what stands in front of the verb, with a help text that lists the verbs."""
    parser = CommandParser("finetune", "VERB ...", description="Fine-tune chat models with DeepSpeed.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"finetune {finetune.__version__}")
    parser.add_argument("--completion", action=_PrintCompletion, choices=("bash", "zsh"), help="print a script that "
                        "completes verbs and flags: source <(finetune --completion bash)")  # fmt: skip
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", parser_class=argparse.ArgumentParser)
    for verb, help_text in VERBS.items():
        verbs.add_parser(verb, help=help_text, add_help=False)
    return parser


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        from finetune.cli import completion

        print(completion.script(values), end="")
        parser.exit()
