"""Command lines: a dataclass declares the options, tyro converts their values, and a mistake gets one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import shlex
import shutil
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from common.errors import UserError
from common.files import expand_home

T = TypeVar("T")
TYRO_CONFIG = (tyro.conf.FlagConversionOff,)  # --resume True, as in nanoGPT, not --resume or --no-resume
HELP = {"-h", "--help"}

_IS_PATH = object()
PathText = Annotated[str, _IS_PATH]
"""The type of an option that is a path but stays text, because it may also be empty or another name."""


class OptionParser(Generic[T]):
    """Parses `[POSITIONAL] [--key value …]` into a dataclass. Names may have `-` for `_`, and `--key=value` works too.

    A path, of type Path or PathText, may begin with `~`, because no shell expands it in `--out_dir=~/run` or in a file.
    tyro would report a mistake as a box of several lines. So names are checked here, and tyro converts single values.
    """

    def __init__(
        self, options: type[T], usage: str, positional: str | None = None, retired: Mapping[str, str] | None = None
    ) -> None:
        """`positional`: the field for the argument without `--`; for all such arguments if it is a tuple.

        `retired`: options that no longer exist, as "name" or "name=value", and what to write instead.
        """
        self.retired = retired or {}
        self.options = options
        self.usage = usage
        self.positional = positional
        self.types: dict[str, Any] = typing.get_type_hints(options)
        self.takes_several = positional is not None and typing.get_origin(self.types[positional]) is tuple
        self.paths = {
            name for name, hint in typing.get_type_hints(options, include_extras=True).items() if is_path(hint)
        }
        self.fields = {field.name: field for field in dataclasses.fields(options)}  # type: ignore[arg-type]

    def parse(self, tokens: Sequence[str]) -> T:
        """Parse `tokens`; of repeated options the last wins. UserError if one is unknown, ill-typed or out of range."""
        if HELP & set(tokens):
            grouped = _with_groups(self.options)
            tyro.cli(grouped, args=["--help"], prog=self.usage.split()[1], description=self.usage, config=TYRO_CONFIG)
        pairs = self.pairs(tokens)
        values: dict[Any, Any] = {name: self._typed(name, value) for name, value in pairs if name != self.positional}
        if given := [value for name, value in pairs if name == self.positional]:
            values[self.positional] = self._positional(given)
        if self.positional and self.positional not in values:
            raise UserError(f"{self.positional} is missing; write {self.usage}")
        try:
            return self.options(**values)
        except ValueError as error:
            raise UserError(str(error)) from error

    def _positional(self, given: Sequence[str]) -> Any:
        assert self.positional is not None
        if not self.takes_several:
            return self._typed(self.positional, given[-1])
        (kind, _) = typing.get_args(self.types[self.positional])
        return tuple(kind(value) for value in given)

    def pairs(self, tokens: Sequence[str]) -> list[tuple[str, str]]:
        """Split `tokens` into pairs of an option's name and its text, in order."""
        pairs: list[tuple[str, str]] = []
        rest = list(tokens)
        while rest:
            token = rest.pop(0)
            if not token.startswith("--"):
                if not self._awaits_positional(pairs):
                    raise UserError(f"{token!r} is not an option; write {self.usage}")
                pairs.append((str(self.positional), token))
                continue
            name, equals, value = token[2:].partition("=")
            name = self.known(name)
            pairs.append((name, value if equals else self._following_value(name, rest, pairs)))
        return [(name, expand_home(value) if name in self.paths else value) for name, value in pairs]

    def _following_value(self, name: str, rest: list[str], pairs: Sequence[tuple[str, str]]) -> str:
        """Remove the value of `--name` from `rest`. A switch without a value, as in `--film OUT_DIR`, means True."""
        is_switch = self.types[name] is bool
        is_there = bool(rest) and not self._is_option(rest[0])
        if is_there and is_switch and rest[0].lower() not in ("true", "false") and self._awaits_positional(pairs):
            is_there = False
        if is_there:
            return rest.pop(0)
        if is_switch:
            return "True"
        raise UserError(f"option --{name} has no value; write --{name} VALUE{self._allowed(name)}")

    def _awaits_positional(self, pairs: Sequence[tuple[str, str]]) -> bool:
        return self.positional is not None and (self.takes_several or self.positional not in dict(pairs))

    def known(self, name: str, value: str = "") -> str:
        """The field of the option `name`. UserError with advice if it does not exist, or is retired with this value."""
        name = name.replace("-", "_")
        for old in (name, f"{name}={value.lower()}"):
            if old in self.retired:
                raise UserError(f"{old} is no option any more: {self.retired[old]}")
        if name in self.fields:
            return name
        close = difflib.get_close_matches(name, self.fields, n=1)
        hint = (
            f"did you mean {close[0]}?" if close else f"see {' '.join(self.usage.split()[:2])} --help for all options"
        )
        raise UserError(f"unknown option {name}; {hint}")

    def _is_option(self, token: str) -> bool:
        return token.startswith("--") and token[2:].partition("=")[0].replace("-", "_") in self.fields

    def _typed(self, name: str, value: str) -> Any:
        self.known(name, value)
        if self.types[name] in (str, str | None):
            return value
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                return tyro.cli(self.types[name], args=[value], config=TYRO_CONFIG)
        except SystemExit:
            raise UserError(f"{name} cannot be {value!r}; write --{name} VALUE{self._allowed(name)}") from None

    def _allowed(self, name: str) -> str:
        """A clause that lists the values of an option, or names their type."""
        choices = [*typing.get_args(self.types[name])] or [self.types[name]]
        flat: list[Any] = []
        for choice in choices:
            flat += typing.get_args(choice) or [choice]
        flat = [choice for choice in flat if choice is not type(None)]
        words = ["True, False" if choice is bool else getattr(choice, "__name__", str(choice)) for choice in flat]
        if len(words) > 1 or bool in flat:
            return f" with one of {', '.join(words)}"
        return f" with a value of type {words[0]}"


def is_path(hint: Any) -> bool:
    """Whether a type hint is Path or PathText, or a tuple, union or annotated type with one of them."""
    return hint is Path or _IS_PATH in getattr(hint, "__metadata__", ()) or any(map(is_path, typing.get_args(hint)))


def option_groups(options: type) -> list[type]:
    """The base classes with headings of a dataclass of options, in the order of their fields."""
    return [base for base in reversed(options.__mro__) if "heading" in vars(base)]


def names_in(group: type) -> list[str]:
    """The options that a group declares itself."""
    return [name for name in vars(group)["__annotations__"] if name != "heading"]


def heading_of(group: Any) -> str:
    return str(group.heading)


def _with_groups(options: type) -> Any:
    """A dataclass for tyro's help, in which each group of options gets a box of its own."""
    groups: list[Any] = option_groups(options)
    if not groups:
        return options
    flat: Any = tyro.conf.OmitArgPrefixes
    defaults = {field.name: field.default for field in dataclasses.fields(options)}  # may replace those of a group
    fields = []
    for group in groups:
        values = {name: defaults[name] for name in names_in(group)}
        fields.append((heading_of(group).replace(" ", "_"), flat[group], group(**values)))
    return dataclasses.make_dataclass("Options", fields, frozen=True)


def command(script: str, *arguments: str, processes: int = 1) -> str:
    """A command line to copy, with the interpreter that runs this, or torchrun for several processes."""
    path, here = Path(__file__).resolve().parents[1] / script, Path.cwd()
    name = script if path.parent == here.resolve() else str(path)
    if processes > 1:
        here_too = os.environ.get("LOCAL_WORLD_SIZE", str(processes))
        return shlex.join(["torchrun", f"--nproc-per-node={here_too}", name, *arguments])
    found, running = shutil.which("python"), Path(sys.executable)
    if found and Path(found).absolute() == running.absolute():
        interpreter = "python"
    else:
        interpreter = str(running.relative_to(here) if running.is_relative_to(here) else running)
    return shlex.join([interpreter, name, *arguments])
