"""The verbs of `finetune`, one file each with a `main(argv)`; they never import each other.

The file of a verb is imported when that verb runs, so `finetune --help` waits for none of them.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import finetune
from finetune.utils.errors import ConfigError, did_you_mean
from finetune.utils.options import HELP_WIDTH, CommandParser, one_of

VERBS = {
    "chat": "talk with a result: in a terminal, from a pipe, or in a browser",
    "convert": "write conversations in any supported layout as one JSON file",
    "convert-config": "write a config of LLaMA-Factory, axolotl, ms-swift or TRL as a recipe",
    "doctor": "check whether a training command will run and fit, on all its hosts",
    "evaluate": "measure a result beside its base: held-out loss, benchmarks, forgetting",
    "launch": "start a script of your own as the deepspeed command does, and supervise it",
    "merge": "merge an adapter, or a ZeRO checkpoint, into a plain model",
    "preview": "show what the rows of a data file render to",
    "push": "upload a result to the Hugging Face hub, without the data",
    "quickstart": "fine-tune a small model and ask it who it is, before and after",
    "recipes": "list the recipes that come with this project, or copy one",
    "report": "write what one or several runs did as one HTML page",
    "train": "fine-tune a model, as a recipe and flags say",
}
EPILOG = """examples:
  # LoRA on all GPUs of this machine (on four: --num_gpus 4)
  finetune train --model_name_or_path Qwen/Qwen3-8B --data_path my.jsonl \\
      --output_dir output --use_lora --bf16 --deepspeed zero2
  # a recipe (`finetune recipes`): LoRA on one 24 GB card
  finetune train qwen3_8b_24gb --data_path my.jsonl --output_dir output
  # the flags of a file; the command line wins
  finetune train recipe.yaml learning_rate=1e-4
  # several hosts, "NAME slots=GPUS" a line
  finetune train --hostfile hosts recipe.yaml
  # continue the adapter in output
  finetune train --model_name_or_path output --data_path more.jsonl \\
      --output_dir output2
  # talk with the result, next to its base
  finetune chat output --compare
  # for vLLM, and a Modelfile for Ollama
  finetune merge output served --gguf q8_0

`finetune VERB --help` lists the flags of a verb."""

# Completion of verbs, their flags, and the values of flags that have choices.
SCRIPT = """\
_finetune() {
  local current=${COMP_WORDS[COMP_CWORD]} verb=${COMP_WORDS[1]} words= values=
  case $verb in
%(flags)s
  esac
  case ${COMP_WORDS[COMP_CWORD-1]} in
%(choices)s
  esac
  COMPREPLY=()
  if ((COMP_CWORD == 1)); then
    words="%(verbs)s --help --version"
  elif [[ -n $values ]]; then
    words=$values
  elif [[ $current != -* ]]; then
    return
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -F _finetune finetune
"""
FOR_ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"


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
        raise ConfigError(f"unknown command {verb}: {did_you_mean(verb, VERBS, 'see --help')}")
    module_of(verb).main(argv[place + 1 :])


def module_of(verb: str) -> ModuleType:
    """Import the file of a verb."""
    return import_module(f"finetune.cli.{verb.replace('-', '_')}")


def build_parser() -> CommandParser:
    """Build the parser of what stands in front of the verb, with a help text that lists the verbs."""
    parser = CommandParser("finetune", "VERB ...", description="Fine-tune chat models with DeepSpeed.", epilog=EPILOG)
    parser.formatter_class = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=HELP_WIDTH)
    parser.add_argument("--version", action="version", version=f"finetune {finetune.__version__}")
    parser.add_argument("--completion", action=_PrintCompletion, choices=("bash", "zsh"), help="print a script that "
                        "completes verbs and flags: source <(finetune --completion bash)")  # fmt: skip
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", parser_class=argparse.ArgumentParser)
    for verb, help_text in VERBS.items():
        verbs.add_parser(verb, help=help_text, add_help=False)
    return parser


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        print(completion_script(values), end="")
        parser.exit()


def completion_script(shell: str) -> str:
    """Return the script for `bash` or `zsh`; words that are no flags are completed as file names."""
    parsers = {verb: _parsers(verb) for verb in VERBS}
    types = {verb: {name: shape for one in parsers[verb] for name, shape in one.types.items()} for verb in VERBS}
    choices = {name: shape.choices for of_verb in types.values() for name, shape in of_verb.items() if shape.choices}
    flags = (f'    {verb}) words="--help {" ".join(f"--{name}" for name in types[verb])}";;' for verb in VERBS)
    values = (f'    --{name}) values="{" ".join(allowed)}";;' for name, allowed in choices.items())
    text = SCRIPT % {"verbs": " ".join(VERBS), "flags": "\n".join(flags), "choices": "\n".join(values)}
    return FOR_ZSH + text if shell == "zsh" else text


def _parsers(verb: str) -> list[CommandParser]:
    from finetune import config, launcher

    if verb in ("launch", "train", "doctor"):
        own = [import_module("finetune.cli.doctor").build_parser()] if verb == "doctor" else []
        return [*own, config.build_parser(), launcher.build_parser(supervised=True)]
    return [module_of(verb).build_parser()]
