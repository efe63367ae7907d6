"""Running the application under uvicorn: a bound socket, a drain on SIGTERM or Ctrl-C, and the end of
a server whose engine has failed.
"""

import asyncio
import logging
import math
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from jlora.errors import ParameterError
from jlora.llm import LLM
from jlora.options import ServeOptions
from jlora.server.app import create_app
from jlora.server.service import Service

log = logging.getLogger(__name__)

CUT_SECONDS = 3
"""How long requests that were cut may take to tell their clients."""

SWITCH_SECONDS = 3e-4
"""Python's threads ask for the interpreter's lock after so long, by default after 5 ms. The engine's
thread, back from the device, would wait so long for the loop that writes to clients: a step's time."""


class Server(uvicorn.Server):
    """uvicorn that refuses new requests as soon as it is asked to stop."""

    def __init__(self, config: uvicorn.Config, service: Service, on_start: Callable[[], None]):
        super().__init__(config)
        self._service = service
        self._on_start = on_start
        self._hurried = False
        self.failure: str | None = None
        """Why the server ended by itself."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second cuts what still runs, a third Ctrl-C leaves at once."""
        if self._service.draining and not self._hurried:
            self._hurried = True
            self._loop.call_soon_threadsafe(self._service.cut)
            return
        super().handle_exit(sig, frame)
        self.stop()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: a server without an engine ends, so that something restarts it."""
        if self.failure is None and (failure := self._service.llm.engine.failure) is not None:
            self.failure = failure
            log.critical("the engine has failed, the server ends: %s", failure)
            self.stop()
        return await super().on_tick(counter)

    def stop(self) -> None:
        """Begin to drain; may be called from any thread."""
        if not self._service.draining:
            self._service.draining = True
            seconds = self._service.options.shutdown_timeout
            log.info("stopping: running requests get %g s", seconds)
            self._loop.call_soon_threadsafe(self._loop.call_later, seconds, self._service.cut)
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet; ParameterError when the address cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        why = error.strerror or error
        raise ParameterError(f"cannot listen on {host} port {port}: {why}", "port") from None
    return sock


def make_server(
    llm: LLM,
    options: ServeOptions,
    *,
    version: str = "",
    on_start: Callable[[], None] = lambda: None,
) -> Server:
    """A server that is ready to run, with its application."""
    app: Starlette = create_app(llm, options, version=version)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=options.log_level == "debug",
        # Only for what a cut stream does not end, such as an adapter that is being read.
        timeout_graceful_shutdown=math.ceil(options.shutdown_timeout) + CUT_SECONDS,
        timeout_keep_alive=75,
        server_header=False,
    )
    return Server(config, app.state.service, on_start)


def run(server: Server, sock: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C; returns when running requests have ended or were cut."""
    sys.setswitchinterval(SWITCH_SECONDS)
    if threading.current_thread() is threading.main_thread():
        # uvicorn raises the signal again when it is done; an orderly end is not a crash.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
    server.run(sockets=[sock])
