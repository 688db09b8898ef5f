"""Command lines: the options of a command are fields of a dataclass, and all faults are reported at once."""

from __future__ import annotations

import argparse
import ast
import math
import os
import re
import textwrap
import types
import typing
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

from finetune.utils.errors import ConfigError, raise_faults

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
HELP_WIDTH, USAGE_WIDTH = 80, 72
FOLDER_FLAGS = ("model_name_or_path", "output_dir", "model", "adapter_name_or_path")
Options = TypeVar("Options")


def option(default: Any, help: str) -> Any:
    """Declare an option as a field of a dataclass; `help` has backticks around what is typed as it stands."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def positional(metavar: str, help: str, default: Any = MISSING) -> Any:
    """Declare a positional argument as a field of a dataclass; without a default it is required."""
    return field(default=default, metadata={"help": help, "metavar": metavar})


def default_of_field(declared: Field[Any]) -> Any:
    """Return what a field holds when its option is not given."""
    return declared.default_factory() if declared.default_factory is not MISSING else declared.default


def describe(text: str, default: Any) -> str:
    """Return a help text with its default in brackets, unless there is none or the text names it."""
    typed = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    is_plain = default is False or default in (None, MISSING, "", [])
    return text if is_plain or "default:" in text else f"{text} [{typed}]"


def fill(group: type[Options], given: dict[str, Any]) -> Options:
    """Build an options dataclass from the values that were given; the others have their defaults."""
    names = [declared.name for declared in fields(group)]  # type: ignore[arg-type]
    return group(**{name: given[name] for name in names if name in given})


@cache
def declaration(library: str, file: str, name: str) -> ast.ClassDef | ast.FunctionDef:
    """Return a class or function of a library's source, for what it declares; importing it would take seconds."""
    tree = ast.parse(source_folder(library).joinpath(file).read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name)


def source_folder(library: str) -> Path:
    """Return the folder of a library's source."""
    spec = find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {library!r}", name=library)
    return Path(spec.submodule_search_locations[0])


@dataclass(frozen=True)
class OptionType:
    """How the words of an option are read: each as a `kind`, or as one of `choices`."""

    kind: type
    is_list: bool = False
    choices: tuple[str, ...] = ()

    @classmethod
    def of(cls, hint: Any) -> OptionType:
        """`str | None` -> str; `list[int]` -> a list of int; `Literal["a", "b"] | None` -> a choice."""
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
            hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
        if typing.get_origin(hint) is list:
            return cls(typing.get_args(hint)[0], is_list=True)
        if typing.get_origin(hint) is Literal:
            return cls(str, choices=typing.get_args(hint))
        return cls(hint)

    def read(self, text: str) -> Any:
        """Return the value of one word; a ValueError says what was expected."""
        if self.choices and text not in self.choices:
            raise ValueError(f"expected {one_of(self.choices)}")
        if self.kind is bool:
            if text.lower() not in BOOLEANS:
                raise ValueError("expected True or False")
            return BOOLEANS[text.lower()]
        # int() alone also takes 1_0 and digits of other scripts
        if self.kind is int and not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
            raise ValueError("expected a whole number")
        try:
            value = self.kind(text)
        except ValueError:
            raise ValueError("expected a number such as 0.5 or 2e-5") from None
        if self.kind is float and not math.isfinite(value):
            raise ValueError("expected a finite number")
        return value


def one_of(choices: Sequence[str]) -> str:
    """`a`, `b`, `c` -> "a, b or c"."""
    return " or ".join(filter(None, [", ".join(choices[:-1]), *choices[-1:]]))


class CommandParser(argparse.ArgumentParser):
    """The parser of a command; an option that is not given leaves no trace in the result.

    A bare boolean option means True. Without a `description`, the docstring of the first group describes the command.
    `kind` says whose options they are, where a command has those of two programs; `foreign` says for names of other
    programs what they are here, and `neighbours` and `recipes` are names that an unknown flag or word may be
    a misspelling of.
    """

    def __init__(
        self, prog: str, usage: str, *groups: type, description: str | None = None, kind: str = "flag", **more: Any
    ) -> None:
        super().__init__(
            prog=prog,
            usage=textwrap.fill(f"{prog} {usage}", USAGE_WIDTH, subsequent_indent=" " * 9, break_on_hyphens=False),
            description=description or " ".join((groups[0].__doc__ or "").split()),
            argument_default=argparse.SUPPRESS,
            formatter_class=partial(argparse.HelpFormatter, max_help_position=28, width=HELP_WIDTH),
            **{"allow_abbrev": False, **more},
        )
        self.kind = kind
        self.foreign: Mapping[str, str] = {}
        self.neighbours: Sequence[str] = ()
        self.recipes: Sequence[str] = ()
        self.required: dict[str, str] = {}
        self.switches: set[str] = set()
        self.types: dict[str, OptionType] = {}
        self.has_positionals = False
        self._faults: list[str] = []
        for index, group in enumerate(groups):
            self.add_group(group, is_titled=index > 0 or description is not None)

    def error(self, message: str) -> typing.NoReturn:
        """Raise instead of exiting: a value is missing, or an abbreviation is ambiguous."""
        raise ConfigError(message.removeprefix("argument "))

    def add_group(
        self, group: type, *, only: Iterable[str] | None = None, is_titled: bool = True, is_optional: bool = False
    ) -> None:
        """Add the fields of a dataclass, or some of them, under its docstring as the title.

        `is_optional`: this command requires none of them, whatever their help says.
        """
        section = self.add_argument_group((group.__doc__ or "").rstrip(".")) if is_titled else self
        hints = typing.get_type_hints(group)
        for declared in fields(group):
            if only is None or declared.name in only:
                text = describe(declared.metadata["help"], default_of_field(declared))
                text = text.removesuffix(" (required)") if is_optional else text
                metavar = declared.metadata.get("metavar")
                if metavar is not None and declared.default is MISSING:
                    self.required[declared.name] = metavar
                self.add_option(section, declared.name, OptionType.of(hints[declared.name]), text, metavar)

    def add_option(self, section: Any, name: str, shape: OptionType, help: str, metavar: str | None = None) -> None:
        """Add one option, or a positional argument where a `metavar` names it."""
        options: dict[str, Any] = {"help": help.replace("`", "").replace("%", "%%")}
        flag = f"--{name}" if metavar is None else metavar
        options["type"] = self.reader(flag, shape)
        if metavar is not None:
            self.has_positionals = True
            section.add_argument(name, nargs="*" if shape.is_list else "?", metavar=metavar, **options)
            return
        self.types[name] = shape
        if shape.is_list:
            options.update(nargs="*", metavar=shape.kind.__name__)
        elif shape.kind is bool:
            self.switches.add(flag)
            options.update(nargs="?", const=True, metavar="True|False")
        else:
            options.update(metavar="|".join(shape.choices) or shape.kind.__name__)
        section.add_argument(flag, **options)

    def reader(self, flag: str, shape: OptionType) -> Callable[[str], Any]:
        """Return what reads a word of an option; a wrong one becomes a fault of the command."""

        def read(text: str) -> Any:
            try:
                return shape.read(text)
            except ValueError as error:
                self._faults.append(f"{flag} {text}: {error}")

        return read

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return the values that were given, by name; a `ConfigError` names every fault, with near known options."""
        given, faults = self.read(argv)
        raise_faults(faults)
        return given

    def read(self, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """Return the values that were given, by name, and what is wrong with the others."""
        self._faults.clear()
        argv = list(map(self._in_ascii, argv))
        if self.has_positionals:
            parsed, unknown = self.parse_known_intermixed_args(self._with_values(argv))
        else:
            parsed, unknown = self.parse_known_args(list(argv))
        given = vars(parsed)
        missing = [metavar for name, metavar in self.required.items() if not given.get(name)]
        faults = [*self._faults, *self.unknown(unknown, argv)]
        return given, [*faults, *([f"missing: {', '.join(missing)}"] if missing else [])]

    def unknown(self, words: Sequence[str], argv: Sequence[str] = ()) -> list[str]:
        """Return a fault for each unknown option among words of `argv` that none took; else one for the first word."""
        flags = [word.partition("=")[0] for word in words if re.match(r"--\S|-[A-Za-z]", in_ascii(word))]
        if words and not flags:
            return [f"unexpected argument {words[0]!r}: {self._why_unexpected(words[0], argv)}"]
        faults, known = [], [*self.types, *self.neighbours]
        for flag in flags:
            name = in_ascii(flag).lstrip("-").replace("-", "_")
            close = get_close_matches(name, known, n=3, cutoff=0.8) or get_close_matches(name, known, n=1)
            nearest = one_of([f"--{near}" for near in close])
            remedy = self.foreign.get(name.lower()) or (f"did you mean {nearest}?" if close else "")
            if "output" in self.required and name in FOLDER_FLAGS:
                remedy = f"the folder stands without a flag, as {self.required['output']}"
            faults.append(f"unknown {self.kind} {flag}: {remedy or f'see {self.prog} --help'}")
        return faults

    def _in_ascii(self, word: str) -> str:
        """Return a word; one of our flags in other characters than ASCII becomes a fault, and is in ASCII then."""
        flag, sign, value = re.match("([^=\uff1d\uff1a]*)(.?)(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
        plain = in_ascii(flag)
        if not (plain.startswith("--") and plain[2:] in self.types) or (plain == flag and sign in ("", "=")):
            return word
        self._faults.append(f"{word}: write the flag in ASCII characters: {plain}{'=' if sign else ''}{value}")
        return f"{plain}={value}" if sign else plain

    def _why_unexpected(self, word: str, argv: Sequence[str]) -> str:
        """Return what may have been meant by a word that belongs to no option."""
        if close := get_close_matches(word, self.recipes, n=1):
            return f"did you mean the recipe {close[0]}?"
        if self.recipes and os.path.isfile(word):
            return "a recipe ends with .yaml, .yml or .json"
        before = argv[: argv.index(word)] if word in argv else ()
        name = next((other.partition("=")[0] for other in reversed(before) if other.startswith("--")), "")
        shape = self.types.get(name.removeprefix("--"))
        if shape is not None and not shape.is_list and shape.kind is not bool:
            return f"{name} takes one value; quote a value that has spaces"
        return " ".join(self.format_usage().split()) if self.has_positionals else "every value belongs to a flag"

    def _with_values(self, argv: Sequence[str]) -> list[str]:
        """Write True behind a bare switch, or it would take the positional argument that follows as its value."""
        return [
            f"{word}=True" if word in self.switches and after.lower() not in BOOLEANS else word
            for word, after in pairwise([*argv, ""])
        ]


def in_ascii(word: str) -> str:
    """Return a word with dashes and full-width characters, as editors and input methods put them, in ASCII.

    >>> in_ascii("\u2014use_lora\uff1dTrue")
    '--use_lora=True'
    """
    return re.sub("[\u2010-\u2013\u2212]", "-", unicodedata.normalize("NFKC", re.sub("[\u2014\u2015]", "--", word)))


def without_flags(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the words of a command without these flags and their values."""
    kept, skips = [], False
    for word in words:
        if word.startswith("--"):
            skips = word.partition("=")[0] in names
        if not skips:
            kept.append(word)
    return kept
