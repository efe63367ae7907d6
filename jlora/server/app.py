"""The HTTP application: routes, keys, and errors in OpenAI's shape. Run it with uvicorn."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jlora.errors import JloraError
from jlora.llm import LLM
from jlora.options import ServeOptions
from jlora.server import management, openai, sglang
from jlora.server.errors import HttpError, Json, answer, error_body
from jlora.server.metrics import Metrics
from jlora.server.service import Service

log = logging.getLogger(__name__)

OPEN = frozenset({"/health", "/ready", "/version", "/metrics"})
"""Paths that need no key and answer while the server drains."""

Handler = Callable[[Request], Awaitable[Response]]


def _route(method: str, path: str, handler: Handler, adapter_field: str | None = None) -> Route:
    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except JloraError as error:
            return answer(error, adapter_field)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            log.error("%s %s failed", request.method, request.url.path, exc_info=error)
            message = f"internal error ({type(error).__name__}); see the server's log"
            return Json(error_body(500, message, None), status_code=500)

    return Route(path, guarded, methods=[method])


ROUTES = [
    _route("POST", "/v1/completions", openai.completions, "model"),
    _route("POST", "/v1/chat/completions", openai.chat, "model"),
    _route("GET", "/v1/models", openai.models),
    _route("GET", "/v1/models/{model:path}", openai.model),
    _route("POST", "/tokenize", openai.tokenize, "model"),
    _route("POST", "/detokenize", openai.detokenize, "model"),
    _route("POST", "/v1/load_lora_adapter", management.load_vllm, "lora_path"),
    _route("POST", "/v1/unload_lora_adapter", management.unload_vllm, "lora_name"),
    _route("GET", "/v1/adapters", management.adapters),
    _route("POST", "/v1/adapters/{name:path}/merge", management.merge),
    _route("POST", "/v1/adapters/{name:path}/unmerge", management.unmerge),
    _route("POST", "/load_lora_adapter", management.load_sglang),
    _route("POST", "/unload_lora_adapter", management.unload_sglang),
    _route("POST", "/generate", sglang.generate, "lora_path"),
    _route("GET", "/health", management.health),
    _route("GET", "/ready", management.ready),
    _route("GET", "/version", management.version),
    _route("GET", "/metrics", management.metrics),
]


class Gate:
    """Keys and draining, before a body is read."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            refusal = self._refusal(Request(scope))
            if refusal is not None:
                await answer(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> HttpError | None:
        if not self._service.authorised(request.headers.get("authorization")):
            return HttpError(401, "Invalid or missing API key: send `Authorization: Bearer KEY`")
        if self._service.draining:
            return HttpError(503, "the server is shutting down")
        return None


def create_app(llm: LLM, options: ServeOptions, *, version: str = "") -> Starlette:
    """The application on a loaded model. `app.state.service` is its Service."""
    metrics = Metrics(engine=llm.engine, store=llm.store, model_name=llm.names[0], version=version)
    service = Service(llm=llm, options=options, metrics=metrics)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.loaders.shutdown(wait=False, cancel_futures=True)

    app = Starlette(
        routes=ROUTES,
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
    )
    app.add_middleware(Gate, service=service)  # pyright: ignore[reportArgumentType]
    app.state.service = service
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    return Json(error_body(error.status_code, message, None), status_code=error.status_code)
