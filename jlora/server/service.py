"""What every route needs: the loaded model, bodies with a size limit, streams that end with their
client, server-sent events.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jlora.adapters.store import AdapterEntry, looks_like_mix
from jlora.engine.params import SamplingParams
from jlora.errors import UnknownModelError
from jlora.llm import LLM
from jlora.options import ServeOptions
from jlora.server.body import TBody, parse_body
from jlora.server.errors import HttpError, error_body, to_json
from jlora.server.metrics import Metrics
from jlora.stream import Delta, LoopWaker, Stream

T = TypeVar("T")
log = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"


@dataclass(kw_only=True)
class Service:
    """One server: a loaded model, its options and metrics. Lives on one event loop."""

    llm: LLM
    options: ServeOptions
    metrics: Metrics
    draining: bool = False
    """True from SIGTERM on: requests that run may end, new ones are refused."""
    created: int = field(default_factory=lambda: int(time.time()))
    waker: LoopWaker | None = None
    streams: set[Stream] = field(default_factory=set)
    """Requests that run."""
    loaders: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(2, thread_name_prefix="adapter-load")
    )
    """Adapter loads have threads of their own, so that many loads never hold up a tokenizer."""

    @property
    def ready(self) -> bool:
        return self.llm.engine.ready and not self.draining

    def authorised(self, header: str | None) -> bool:
        """Whether an Authorization header carries one of the keys."""
        keys = self.options.api_key
        if not keys:
            return True
        scheme, _, token = (header or "").partition(" ")
        given = token.strip().encode()
        matches = [hmac.compare_digest(given, key.encode()) for key in keys]
        return scheme.lower() == "bearer" and any(matches)

    def resolve(self, model: str | None, lora_path: str | None = None) -> AdapterEntry | None:
        """The adapter of a request. `model` wins; SGLang's `lora_path` names one for the base model."""
        entry = self.llm.resolve(model)
        if entry is None and lora_path:
            entry = self.llm.resolve(lora_path)
            if entry is None and lora_path not in self.llm.names:
                raise UnknownModelError(f"The adapter `{lora_path}` does not exist.")
        return entry

    async def find(self, model: str | None, lora_path: str | None = None) -> AdapterEntry | None:
        """`resolve` for handlers: a mix of adapters is read on a worker thread."""
        if any(looks_like_mix(name) for name in (model, lora_path) if name):
            return await asyncio.to_thread(self.resolve, model, lora_path)
        return self.resolve(model, lora_path)

    def stream(
        self, prompts: list[list[int]], params: SamplingParams, adapter: AdapterEntry | None
    ) -> Stream:
        """Start a request on this server's loop."""
        if not self.llm.engine.ready:
            raise HttpError(503, "the engine has stopped; see the server's log")
        if self.waker is None:
            self.waker = LoopWaker(asyncio.get_running_loop())
        try:
            stream = self.llm.stream(prompts, params, adapter=adapter, waker=self.waker)
        except UnknownModelError:
            if adapter is None:
                raise
            # Replaced under its name while the prompt was tokenized: the new weights are meant.
            adapter = self.llm.resolve(adapter.name)
            stream = self.llm.stream(prompts, params, adapter=adapter, waker=self.waker)
        self.metrics.started(stream)
        self.streams.add(stream)
        return stream

    async def next(self, stream: Stream) -> list[Delta]:
        """A stream's next deltas, counted; [] at the end. The engine's failure of one choice ends the
        request."""
        deltas = await stream.next()
        self.metrics.observed(stream, deltas)
        for delta in deltas:
            if delta.finish_reason == "error":
                raise self.failure(stream, delta.error or "the engine failed")
        return deltas

    def failure(self, stream: Stream, message: str) -> HttpError:
        """An adapter that could not be read is its owner's error; anything else is ours."""
        broken = getattr(stream.adapter, "error", None)
        return HttpError(400 if broken else 500, message, "model" if broken else None)

    async def finish(self, stream: Stream) -> None:
        """Read a stream to its end."""
        stream.read_at_the_end()
        while await self.next(stream):
            pass

    def close(self, stream: Stream) -> None:
        """End a request, whatever happened: abort what still runs, count it once."""
        stream.close()
        self.streams.discard(stream)
        self.metrics.ended(stream)

    def cut(self) -> None:
        """End every running request now; their clients get what is there, with reason "abort"."""
        if self.streams:
            log.warning("cutting %d running requests", len(self.streams))
        for stream in list(self.streams):
            stream.cut()


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a JSON request; refused when it is too large or says that it is something else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpError(415, f"Content-Type must be application/json, got {kind or 'none'!r}")
    too_large = HttpError(413, f"the body is larger than {limit} bytes (--max-body-bytes)")
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit():
        raise HttpError(400, f"Content-Length must be a number, got {declared[:40]!r}")
    if int(declared) > limit:
        raise too_large
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > limit:
            raise too_large
    return bytes(data)


async def read(request: Request, cls: type[TBody]) -> TBody:
    """The checked body of a request; large ones are parsed off the loop."""
    service: Service = request.app.state.service
    data = await read_body(request, service.options.max_body_bytes)
    if len(data) > 1 << 16:
        return await asyncio.to_thread(parse_body, cls, data)
    return parse_body(cls, data)


async def attend(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do `work`; ClientDisconnect, with the work cancelled, when the client leaves first."""
    job = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((job, gone), return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientDisconnect
        return job.result()
    finally:
        for task in (job, gone):
            task.cancel()
        await asyncio.gather(job, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events of a stream, whose first deltas are there already. What comes together is
    sent together. The stream is closed when it has ended or the client leaves."""

    def __init__(
        self,
        service: Service,
        stream: Stream,
        first: list[Delta],
        events: Callable[[list[Delta]], bytes],
        *,
        head: Callable[[], bytes] = bytes,
        tail: Callable[[], bytes] = bytes,
    ):
        """`events` writes deltas; `head` and `tail` what comes before and after all of them."""
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._service, self._stream, self._first = service, stream, first
        self._events, self._head, self._tail = events, head, tail

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await attend(receive, self._send(send))
        except ClientDisconnect:
            pass
        finally:
            self._service.close(self._stream)

    async def _send(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        deltas, body = self._first, self._head()
        try:
            while deltas:
                body += self._events(deltas)
                await send({"type": "http.response.body", "body": body, "more_body": True})
                body, deltas = b"", await self._service.next(self._stream)
            body += self._tail()
        except HttpError as error:  # too late for a status: the stream says it itself
            body = event(error_body(error.status, str(error), error.param))
        await send({"type": "http.response.body", "body": body + DONE, "more_body": False})


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"
