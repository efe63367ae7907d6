"""Command lines from frozen dataclasses: one field is one flag, its docstring is the help.

`parse(Options)` reads flags and `--config FILE` (TOML, or YAML by its suffix); flags win over the
file. An unknown flag or key is an error that says the nearest names. Errors are one line on stderr
and exit status 2.
"""

import argparse
import ast
import dataclasses
import inspect
import json
import sys
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from jlora.errors import JloraError, ParameterError
from jlora.near import near

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What a field holds: `base` values, one or (`many`) several, of `choices` if there are any."""

    base: type
    many: bool = False
    choices: tuple[str, ...] = ()


def kind_of(annotation: Any) -> Kind:
    """The kind of `str`, `int | None`, `tuple[str, ...]`, `Literal["a", "b"]`, `bool` and so on."""
    if get_origin(annotation) in (UnionType, Union):
        (annotation,) = (arg for arg in get_args(annotation) if arg is not NoneType)
    if get_origin(annotation) is Literal:
        return Kind(base=str, choices=get_args(annotation))
    if get_origin(annotation) is tuple:
        return Kind(base=get_args(annotation)[0], many=True)
    assert annotation in (str, int, float, bool), annotation
    return Kind(base=annotation)


@lru_cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass and of its bases, as one line each."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for item, after in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[item.target.id] = " ".join(str(after.value.value).split())
    return docs


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and without abbreviations."""

    absent: Mapping[str, str] = {}
    """Field names that others have and we need not, and what to do instead."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def read(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """What was given, by field. Every unknown flag is named, with the flags that it is near to."""
        argv = sys.argv[1:] if argv is None else argv
        found, rest = self.parse_known_args(argv)
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        unknown = [text.partition("=")[0] for text in rest if text.startswith("-")]
        if unknown:
            help_of = f"python -m {self.prog} --help lists them"
            lines = (
                f"unknown flag {flag}: {self.absent.get(_field(flag)) or near(flag, known) or help_of}"
                for flag in unknown
            )
            self.error("; ".join(lines))
        if rest:
            first = argv[0] == rest[0] and "--model" in known  # vllm serve MODEL
            hint = f"; for a model write --model {rest[0]}" if first else ""
            self.error(f"unexpected argument {rest[0]!r}: flags start with --{hint}")
        return vars(found)


def _field(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def build_parser(cls: type, *, prog: str, accepted: Sequence[str] = ()) -> Parser:
    """One flag per field. `accepted` flags are read and change nothing."""
    assert dataclasses.is_dataclass(cls)
    parser = Parser(
        prog=prog,
        description=inspect.getdoc(cls),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=100),
    )
    parser.absent = getattr(cls, "ABSENT", {})
    parser.add_argument(
        "--config", metavar="FILE", help="TOML or YAML file with these options; flags win"
    )
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = kind_of(hints[field.name])
        names = [_flag(field.name), *field.metadata.get("aliases", ())]
        text = field_docs(cls)[field.name].replace("%", "%%")
        if field.default not in (None, (), ""):
            text += f" (default: {field.default})"
        common: dict[str, Any] = {"dest": field.name, "help": text}
        if field.metadata.get("positional"):
            parser.add_argument(field.name, nargs="?", help=text)
        elif kind.base is bool:
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
        elif kind.many:
            parser.add_argument(
                *names, nargs="+", action="extend", type=kind.base, metavar="X", **common
            )
        elif kind.choices:
            parser.add_argument(*names, choices=kind.choices, **common)
        else:
            metavar = {str: "TEXT", int: "N", float: "X"}[kind.base]
            parser.add_argument(*names, type=kind.base, metavar=metavar, **common)
    for name in accepted:
        parser.add_argument(
            name,
            action="store_true",
            dest="_accepted",
            help="accepted for compatibility; always on",
        )
    return parser


def _read_table(path: str) -> dict[Any, Any]:
    """The content of a TOML file, or of a YAML file by its suffix."""
    kind = "YAML" if path.lower().endswith((".yaml", ".yml")) else "TOML"
    try:
        with open(path, "rb") as file:
            if kind == "TOML":
                return tomllib.load(file)
            table = yaml.safe_load(file)
    except OSError as error:
        raise ParameterError(f"--config {path}: {error.strerror}", "config") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise ParameterError(f"--config {path}: not {kind} ({why})", "config") from None
    if table is None:  # an empty file
        return {}
    if not isinstance(table, dict):
        raise ParameterError(
            f"--config {path}: keys with values are needed, got {table!r}", "config"
        )
    return table


def _from_file(cls: type, path: str) -> dict[str, Any]:
    """The options of a config file, checked against the fields' types."""
    table = _read_table(path)
    hints = get_type_hints(cls)
    assert dataclasses.is_dataclass(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = str(key).replace("-", "_")
        if name not in known:
            hint = getattr(cls, "ABSENT", {}).get(name) or near(name, known)
            hint = hint or f"known are {', '.join(sorted(known))}"
            raise ParameterError(f"--config {path}: unknown key {key!r}: {hint}", name)
        if name in values:
            raise ParameterError(f"--config {path}: {name} is there twice", name)
        values[name] = _convert(kind_of(hints[name]), value, f"--config {path}: {key}")
    return values


def _convert(kind: Kind, value: Any, where: str) -> Any:
    """A value of a file as the field's type. Tables stand for NAME=VALUE or for JSON in a list of texts."""
    if kind.many:
        if isinstance(value, dict):
            value = [f"{name}={item}" for name, item in value.items()]
        if not isinstance(value, list):
            raise ParameterError(f"{where} must be a list, got {value!r}", where)
        items = [
            json.dumps(item, default=str) if isinstance(item, dict) else item for item in value
        ]
        one = dataclasses.replace(kind, many=False)
        return tuple(_convert(one, item, where) for item in items)
    if kind.base is float and type(value) is int:
        value = float(value)
    if type(value) is not kind.base:
        raise ParameterError(f"{where} must be {kind.base.__name__}, got {value!r}", where)
    if kind.choices and value not in kind.choices:
        raise ParameterError(
            f"{where} must be one of {', '.join(kind.choices)}, got {value!r}", where
        )
    return value


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    accepted: Sequence[str] = (),
) -> T:
    """An instance of `cls` from the command line. Exits with status 2 and one line when it is wrong."""
    parser = build_parser(cls, prog=prog or "jlora", accepted=accepted)
    given = parser.read(argv)
    given.pop("_accepted", None)
    try:
        path = given.pop("config", None)
        values = _from_file(cls, path) if path is not None else {}
        for name, value in given.items():
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)
    except JloraError as error:
        parser.error(str(error))


def fail(prog: str, error: BaseException) -> NoReturn:
    """End the program because of a user's mistake: one line, status 2, no traceback."""
    print(f"{prog}: error: {error}", file=sys.stderr)
    raise SystemExit(2)
