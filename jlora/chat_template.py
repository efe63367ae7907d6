"""Chat templates in jinja2's sandbox.

A template comes from a checkpoint or from an adapter's folder, so it is somebody else's program: it
sees plain values only, can change nothing, and whatever it raises is the request's error. An adapter's
is rendered in a process of its own: loops in loops and doubled texts have no bound inside of jinja2.
"""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jlora.errors import ParameterError

MAX_CHARACTERS = 1 << 24
CPU_SECONDS = 2
"""CPU time of one rendering in a process of its own; the kernel counts it in whole seconds."""
MAX_BYTES = 1 << 30
"""Memory that renderings there may take beside the interpreter's own."""


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


class TemplateProcess:
    """Renders adapters' templates in a process that the kernel ends when one takes too long.

    It starts with the first rendering. Thread-safe; one rendering at a time. A template that took
    too long is refused from then on, so that requests for it hold up the others only once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._slow: set[str] = set()

    def render(self, template: str, context: Mapping[str, Any]) -> str:
        """The text of `template`; ParameterError (param `messages`) as of the function `render`."""
        try:
            line = json.dumps([template, dict(context)]).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ParameterError(f"the messages are not JSON: {error}", "messages") from None
        with self._lock:
            if template in self._slow:
                raise _too_slow()
            reply = self._ask(line)
            if not reply.endswith(b"\n"):
                assert self._process is not None
                status = self._process.wait()
                _end(self._process)
                self._process = None
                if status == -signal.SIGXCPU:
                    self._slow.add(template)
                    raise _too_slow()
                raise ParameterError(
                    f"the process that renders the chat template ended with status {status}",
                    "messages",
                )
        text, error = json.loads(reply)
        if error is not None:
            raise ParameterError(error, "messages")
        return text

    def _ask(self, line: bytes) -> bytes:
        """One line of the process; nothing, or a part of it, if the process ends."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            return process.stdout.readline()
        except BrokenPipeError:
            return b""

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from jlora.chat_template import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            },
            start_new_session=True,  # Ctrl-C is for the server, which lets requests end
        )
        weakref.finalize(self, _end, process)
        return process


def _too_slow() -> ParameterError:
    return ParameterError(
        f"the adapter's chat template takes more than {CPU_SECONDS} seconds of CPU time", "messages"
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process, whatever it does, and forgets its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        # What it was told last may still be unread.
        with suppress(BrokenPipeError):
            if pipe is not None:
                pipe.close()


def serve() -> None:
    """The process: a line [template, context] in, a line [text, error] out, until the input ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if (pages := Path("/proc/self/statm")).exists():  # Linux
        now = int(pages.read_text().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, now + MAX_BYTES)
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + CPU_SECONDS)
        try:
            template, context = json.loads(line)
            reply: list[str | None] = [render(template, context), None]
        except ParameterError as error:
            reply = [None, str(error)]
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


def _limit(what: int, soft: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (soft if hard < 0 else min(soft, hard), hard))
