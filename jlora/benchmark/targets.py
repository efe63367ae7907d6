"""What a benchmark loads: an `LLM` in this process, or a server with OpenAI's completions route."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any

from jlora.engine.params import SamplingParams
from jlora.errors import JloraError
from jlora.llm import LLM
from jlora.stream import LoopWaker

TIMEOUT = 600.0
"""Seconds that a server may be silent."""


class EngineTarget:
    """An engine in this process, without HTTP and text formats. Make it on the running loop."""

    def __init__(self, llm: LLM):
        self._llm = llm
        self._waker = LoopWaker(asyncio.get_running_loop())

    async def generate(self, model: str, prompt: list[int], max_tokens: int) -> AsyncIterator[int]:
        """As `load.Target` says."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        adapter = self._llm.resolve(model)
        stream = self._llm.stream([prompt], params, adapter=adapter, waker=self._waker)
        try:
            while deltas := await stream.next():
                for delta in deltas:
                    if delta.error is not None:
                        raise JloraError(f"{model}: the request failed: {delta.error}")
                yield sum(len(delta.token_ids) for delta in deltas)
        finally:
            stream.close()


class HttpTarget:
    """A server; use it as an async context manager."""

    def __init__(self, base_url: str, *, closed: bool = True):
        """`closed`: connections stay open, as a client's in a closed loop do. A server's key is taken
        from $OPENAI_API_KEY, as OpenAI's client does: a flag would end up in the results."""
        # Lazy: a benchmark in process does without.
        import httpx

        self._url = base_url.rstrip("/").removesuffix("/v1")
        # No limit: the load alone decides how many requests run.
        limits = httpx.Limits(
            max_connections=None, max_keepalive_connections=None if closed else 100
        )
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.AsyncClient(
            timeout=TIMEOUT, limits=limits, headers=headers, trust_env=False
        )
        self._failures = (httpx.HTTPError, httpx.InvalidURL)

    async def __aenter__(self) -> "HttpTarget":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def version(self) -> str | None:
        """What GET /version says, if the server has it."""
        try:
            reply = await self._client.get(f"{self._url}/version")
            return str(reply.json()["version"]) if reply.status_code == 200 else None
        except self._failures as error:
            raise self._unreachable(error) from None
        except (ValueError, KeyError, TypeError):
            return None

    async def generate(self, model: str, prompt: list[int], max_tokens: int) -> AsyncIterator[int]:
        """As `load.Target` says. The last value corrects the count to the server's own."""
        body: dict[str, Any] = {
            "model": model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        seen, total = 0, None
        try:
            async with self._client.stream(
                "POST", f"{self._url}/v1/completions", json=body
            ) as reply:
                if reply.status_code != 200:
                    raise JloraError(f"{model}: {_problem(reply.status_code, await reply.aread())}")
                async for line in reply.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise JloraError(f"{model}: {_problem(200, line[6:].encode())}")
                    if usage := chunk.get("usage"):
                        total = int(usage["completion_tokens"])
                    if chunk["choices"]:
                        seen += 1
                        yield 1
        except self._failures as error:
            raise self._unreachable(error) from None
        # An event may carry no token or several; only the server knows how many there were.
        if total is not None and total != seen:
            yield total - seen

    def _unreachable(self, error: Exception) -> JloraError:
        return JloraError(f"cannot talk to {self._url}: {error or type(error).__name__}")


def _problem(status: int, body: bytes) -> str:
    """A server's error in one line."""
    try:
        value = json.loads(body)
        error = value.get("error", value)
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, AttributeError):
        text = body.decode(errors="replace")
    return f"the server answered {status}: {' '.join(text.split())[:300]}"
