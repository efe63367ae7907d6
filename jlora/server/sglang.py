"""SGLang's native POST /generate: texts or token ids, `sampling_params`, `lora_path`."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jlora.engine.params import SamplingParams
from jlora.engine.sequence import TokenLogprobs
from jlora.errors import ParameterError
from jlora.server.errors import Json
from jlora.server.replies import shown
from jlora.server.service import EventStream, Service, attend, event, read
from jlora.server.sglang_protocol import SGLangBody, SGLangSampling
from jlora.stream import Choice, Delta, Stream


@dataclass(frozen=True, kw_only=True)
class Part:
    """One prompt of a /generate request, with its own parameters and adapter."""

    ids: list[int]
    params: SamplingParams
    lora_path: str | None


def service_of(request: Request) -> Service:
    return request.app.state.service


async def generate(request: Request) -> Response:
    service = service_of(request)
    body = await read(request, SGLangBody)
    parts, many = await asyncio.to_thread(parts_of, service, body)
    streams: list[Stream] = []
    handed_on = False
    try:
        for part in parts:
            adapter = await service.find(part.lora_path or None)  # "" is SGLang's base too
            streams.append(service.stream([part.ids], part.params, adapter))
        if not body.stream:
            for stream in streams:
                await attend(request.receive, service.finish(stream))
            replies = [reply(body, c, s) for s in streams for c in s.choices]
            return Json(replies if many or len(replies) > 1 else replies[0])
        if len(streams) > 1:
            raise ParameterError("a batch of prompts cannot be streamed; send one each", "stream")
        (stream,) = streams
        first = await attend(request.receive, service.next(stream))

        def events(deltas: list[Delta]) -> bytes:
            """Each holds the whole text so far, as SGLang's do."""
            values = [(reply(body, stream.choices[d.index], stream), d.index) for d in deltas]
            return b"".join([event(value | {"index": index}) for value, index in values])

        handed_on = True
        return EventStream(service, stream, first, events)
    finally:
        if not handed_on:
            for stream in streams:
                service.close(stream)


def parts_of(service: Service, body: SGLangBody) -> tuple[list[Part], bool]:
    """The prompts of a body, and whether they came as a batch."""
    if (body.text is None) == (body.input_ids is None):
        raise ParameterError("give either text or input_ids", "text")
    if body.text is not None:
        many = isinstance(body.text, list)
        texts = body.text if isinstance(body.text, list) else [body.text]
        names = _each(body.lora_path, len(texts), "lora_path")
        own = [service.llm.tokenizer_of(service.resolve(name or None)) for name in names]
        prompts = [tokenizer.encode(text) for tokenizer, text in zip(own, texts, strict=True)]
    else:
        ids: list[Any] = list(body.input_ids or ())
        many = bool(ids) and isinstance(ids[0], list)
        prompts = ids if many else [ids]
    if not prompts:
        raise ParameterError("the batch is empty", "text")
    count = len(prompts)
    sampling = _each(body.sampling_params or SGLangSampling(), count, "sampling_params")
    loras = _each(body.lora_path, count, "lora_path")
    logprobs = max(0, body.top_logprobs_num or 0) if body.return_logprob else None
    wants_prompt = body.return_logprob and (body.logprob_start_len or 0) >= 0
    return [
        Part(
            ids=list(ids),
            params=one.params(
                logprobs=logprobs, prompt_logprobs=logprobs if wants_prompt else None
            ),
            lora_path=lora,
        )
        for ids, one, lora in zip(prompts, sampling, loras, strict=True)
    ], many


def _each(value: Any, count: int, name: str) -> list[Any]:
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise ParameterError(f"{name} has {len(value)} items for {count} prompts", name)
    return value


def reply(body: SGLangBody, choice: Choice, stream: Stream) -> dict[str, Any]:
    """SGLang's answer about one choice, as far as it has come."""
    matched: dict[str, Any] | None = None
    if choice.finish_reason == "length":
        matched = {"type": "length", "length": choice.params.max_tokens}
    elif choice.finish_reason is not None:
        last = choice.token_ids[-1] if choice.token_ids else None
        ended_by = last if choice.stop_reason is None else choice.stop_reason
        matched = {"type": choice.finish_reason, "matched": ended_by}
    meta: dict[str, Any] = {
        "id": body.rid if isinstance(body.rid, str) else choice.request_id,
        "finish_reason": matched,
        "prompt_tokens": len(choice.prompt_ids),
        "completion_tokens": len(choice.token_ids),
        "cached_tokens": choice.cached_tokens,
        "e2e_latency": time.monotonic() - stream.created,
    }
    if body.return_logprob:
        meta |= _logprobs(body, choice)
    return {"text": choice.text, "output_ids": choice.token_ids, "meta_info": meta}


def _logprobs(body: SGLangBody, choice: Choice) -> dict[str, Any]:
    """Triples of logprob, token id and (if wanted) text."""

    def triple(token: int, value: float | None) -> list[Any]:
        text = choice.tokenizer.token_text(token) if body.return_text_in_logprobs else None
        return [None if value is None else shown(value), token, text]

    def top(score: TokenLogprobs | None) -> list[Any] | None:
        return None if score is None else [triple(t, value) for t, value in score.top.items()]

    start = max(0, body.logprob_start_len or 0)
    prompt = choice.prompt_logprobs or []
    inputs = [
        triple(token, None if score is None else score.logprob)
        for token, score in zip(choice.prompt_ids, prompt, strict=False)
    ]
    result: dict[str, Any] = {
        "input_token_logprobs": inputs[start:],
        "output_token_logprobs": [triple(s.token, s.logprob) for s in choice.logprobs],
    }
    if body.top_logprobs_num:
        result["input_top_logprobs"] = [top(score) for score in prompt][start:]
        result["output_top_logprobs"] = [top(score) for score in choice.logprobs]
    return result
