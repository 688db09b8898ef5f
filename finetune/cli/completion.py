"""Shell completion: a script with the verbs, their flags, and the values of flags that have choices."""

from __future__ import annotations

from importlib import import_module

from finetune.cli import VERBS
from finetune.utils.options import CommandParser

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


def script(shell: str) -> str:
    """Return the script for `bash` or `zsh`; words that are no flags are completed as file names."""
    parsers = {verb: _parsers(verb) for verb in VERBS}
    types = {verb: {name: shape for one in parsers[verb] for name, shape in one.types.items()} for verb in VERBS}
    choices = {name: shape.choices for of_verb in types.values() for name, shape in of_verb.items() if shape.choices}
    flags = (f'    {verb}) words="--help {" ".join(f"--{name}" for name in types[verb])}";;' for verb in VERBS)
    values = (f'    --{name}) values="{" ".join(allowed)}";;' for name, allowed in choices.items())
    text = SCRIPT % {"verbs": " ".join(VERBS), "flags": "\n".join(flags), "choices": "\n".join(values)}
    return FOR_ZSH + text if shell == "zsh" else text


def _parsers(verb: str) -> list[CommandParser]:
    """Return the parsers whose flags a verb takes."""
    from finetune import config, launcher

    own = [import_module(f"finetune.cli.{verb}").build_parser()] if verb != "launch" else []
    return [*own, config.build_parser(), launcher.build_parser()] if verb in ("launch", "doctor") else own
