"""Chat templates in jinja2's sandbox.

A template comes from a checkpoint or from an adapter's folder, so it is somebody else's program: it
sees plain values only, can change nothing, and whatever it raises is the request's error.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jlora.errors import ParameterError

MAX_CHARACTERS = 1 << 24


class GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text for training; for serving it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own protocol)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, without the two operators that turn a short template into gigabytes."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise jinja2.TemplateError(f"operator {operator} works on numbers only")
        if operator == "**" and abs(right) > 64:
            raise jinja2.TemplateError("exponents above 64 are not allowed")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # jinja2's own filter escapes for HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def render(template: str, context: Mapping[str, Any]) -> str:
    """The text of `template`; ParameterError (param `messages`) with the template's own words."""
    try:
        parts: list[str] = []
        size = 0
        for part in _compile(template).generate(**context):
            size += len(part)
            if size > MAX_CHARACTERS:
                raise jinja2.TemplateError(f"the text is longer than {MAX_CHARACTERS} characters")
            parts.append(part)
    except Exception as error:  # a template is somebody else's program: any error is its own
        raise ParameterError(
            f"the chat template refused these messages: {error}", param="messages"
        ) from None
    return "".join(parts)
