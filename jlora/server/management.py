"""Routes that load, unload and list adapters (vLLM's and SGLang's wire forms), and the server's own
state: health, ready, version, metrics.
"""

import asyncio
import os
import time
from typing import Any

from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from jlora.adapters.store import AdapterEntry, Drain, allowed_path
from jlora.errors import AdapterError, AdapterNotFound, JloraError
from jlora.llm import LLM
from jlora.server.errors import HttpError, Json, status_of
from jlora.server.protocol import LoadBody, UnloadBody
from jlora.server.service import Service, read

DRAIN_SECONDS = 60.0
"""How long an unload request waits for running requests before it answers."""


def service_of(request: Request) -> Service:
    return request.app.state.service


def _gate(service: Service) -> None:
    if not service.options.lora_dir:
        raise HttpError(
            404, "loading adapters at run time is off; start the server with --lora-dir ROOT"
        )


async def _load(request: Request) -> AdapterEntry:
    """Read and register an adapter on a loader's thread: the loop and the engine go on."""
    service = service_of(request)
    _gate(service)
    body = await read(request, LoadBody)
    if not (body.adapter and body.path):
        param = "lora_path" if body.adapter else "lora_name"
        raise AdapterError("Both 'lora_name' and 'lora_path' must be provided.", param)
    _check_not_merged(service, body.adapter)

    def work() -> AdapterEntry:
        path = _locate(body.adapter, body.path, service.options.lora_dir)
        return service.llm.store.load(
            body.adapter, path, pinned=body.pinned, replace=body.load_inplace
        )

    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(service.loaders, work)


def _locate(name: str, path: str, roots: tuple[str, ...]) -> str:
    """The checked real path. A relative one counts from any of the roots or, as with vLLM, from the
    server's working directory. Errors speak of the path that was sent."""
    below = [] if os.path.isabs(path) else [os.path.join(root, path) for root in roots]
    errors: list[AdapterError] = []
    for candidate in (*below, path):
        try:
            return str(allowed_path(candidate, roots))
        except AdapterError as error:
            errors.append(error)
    if any(isinstance(error, AdapterNotFound) for error in errors):
        raise AdapterNotFound(f"Loading lora {name} failed: No adapter found for {path}")
    raise errors[-1]


async def _unload(request: Request) -> Drain:
    """Drop the name, then wait until running requests have ended and the memory is free."""
    service = service_of(request)
    _gate(service)
    body = await read(request, UnloadBody)
    if not body.adapter:
        raise AdapterError(
            "'lora_name' needs to be provided to unload a LoRA adapter.", "lora_name"
        )
    _check_not_merged(service, body.adapter)
    drain = service.llm.store.unload(body.adapter)
    end, pause = time.monotonic() + DRAIN_SECONDS, 0.002
    while not drain.done and not service.draining and time.monotonic() < end:
        await asyncio.sleep(pause)
        pause = min(0.1, pause * 1.5)
    service.metrics.forget(body.adapter)
    return drain


def _check_not_merged(service: Service, name: str) -> None:
    if _merged(service.llm) == name:
        message = f"adapter '{name}' is merged into the weights; unmerge it first"
        raise HttpError(409, message, "lora_name")


def _freed(drain: Drain) -> str:
    if not drain.done:
        return f"{drain.entry.in_flight} requests still run; its memory is freed when they end."
    return (
        f"Freed {drain.host_bytes} bytes of host and {drain.device_bytes} bytes of device memory."
    )


async def load_vllm(request: Request) -> Response:
    """vLLM's answer is plain text."""
    entry = await _load(request)
    return PlainTextResponse(f"Success: LoRA adapter '{entry.name}' added successfully.")


async def unload_vllm(request: Request) -> Response:
    drain = await _unload(request)
    text = f"Success: LoRA adapter '{drain.entry.name}' removed successfully."
    return PlainTextResponse(f"{text} {_freed(drain)}")


def _sglang(service: Service, error: JloraError | None = None) -> Json:
    """SGLang's answer: always this JSON, 200 or 400."""
    loaded = {str(item["name"]): str(item["path"]) for item in service.llm.store.adapters()}
    body: dict[str, Any] = {
        "success": error is None,
        "error_message": "" if error is None else str(error),
        "loaded_adapters": loaded,
    }
    if error is None:
        return Json(body)
    # SGLang knows 400 only; being refused access is not a wrong field and keeps its own status.
    status = status_of(error)
    return Json(body, status_code=status if status in (403, 413, 415) else 400)


async def load_sglang(request: Request) -> Response:
    service = service_of(request)
    try:
        await _load(request)
    except JloraError as error:
        return _sglang(service, error)
    return _sglang(service)


async def unload_sglang(request: Request) -> Response:
    service = service_of(request)
    try:
        await _unload(request)
    except JloraError as error:
        return _sglang(service, error)
    return _sglang(service)


async def merge(request: Request) -> Response:
    """Into the weights; answers when the running requests have ended and it is done."""
    return await _in_place(request, "merge_in_place", "merged")


async def unmerge(request: Request) -> Response:
    return await _in_place(request, "unmerge_in_place", "unmerged")


async def _in_place(request: Request, method: str, done: str) -> Response:
    service, name = service_of(request), request.path_params["name"]
    if not (service.options.lora_dir or service.options.merge):
        raise HttpError(
            404, "merging at run time is off; start the server with --lora-dir ROOT or --merge NAME"
        )
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(service.loaders, getattr(service.llm, method), name)
    return Json({"id": name, "object": "adapter", done: True})


async def adapters(request: Request) -> Response:
    """Every adapter: path, rank, modules, bytes, tier, pinned, in flight, last use, load time, and
    whether it is merged into the weights."""
    llm = service_of(request).llm
    name = _merged(llm)
    data = [facts | {"merged": facts["name"] == name} for facts in llm.store.adapters()]
    return Json({"object": "list", "data": data})


def _merged(llm: LLM) -> str | None:
    """Name of the adapter that is merged into the weights."""
    entry = llm.engine.merged
    return None if entry is None else entry.name


async def health(request: Request) -> Response:
    """503 once the engine has stopped, as vLLM answers: only a restart helps then."""
    return Response(status_code=200 if service_of(request).llm.engine.ready else 503)


async def ready(request: Request) -> Response:
    service = service_of(request)
    if service.ready:
        return Json({"ready": True})
    if not service.draining:
        raise HttpError(503, "the engine has stopped; see the server's log")
    raise HttpError(503, "the server is shutting down")


async def version(request: Request) -> Response:
    return Json({"version": service_of(request).metrics.version})


async def metrics(request: Request) -> Response:
    # Off the loop: the collector asks the engine and the store.
    page = await asyncio.to_thread(service_of(request).metrics.page)
    return Response(page, media_type=CONTENT_TYPE_LATEST)
