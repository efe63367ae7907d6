"""OpenAI's routes: completions, chat, models; and vLLM's tokenize and detokenize."""

import asyncio
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jlora.adapters.store import AdapterEntry
from jlora.errors import ParameterError, UnknownModelError
from jlora.llm import template_of
from jlora.server.body import Body, parse_body
from jlora.server.errors import Json
from jlora.server.protocol import (
    ChatBody,
    CompletionBody,
    Conversation,
    DetokenizeBody,
    StreamOptions,
    TokenizeBody,
    TokenizeChatBody,
    render_options,
)
from jlora.server.replies import ChatReply, CompletionReply, usage_of
from jlora.server.service import EventStream, Service, attend, event, read, read_body
from jlora.stream import Delta, Stream
from jlora.tokenizer import Tokenizer

Reply = CompletionReply | ChatReply


def service_of(request: Request) -> Service:
    return request.app.state.service


async def completions(request: Request) -> Response:
    service = service_of(request)
    body = await read(request, CompletionBody)
    params, prompts = body.params(), body.prompts
    entry = await service.find(body.model, body.lora_path)
    special = True if body.add_special_tokens is None else body.add_special_tokens
    texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]

    tokenizer = service.llm.tokenizer_of(entry)

    def encode() -> list[list[int]]:
        return [
            tokenizer.encode(p, add_special_tokens=special) if isinstance(p, str) else list(p)
            for p in prompts
        ]

    ids = await asyncio.to_thread(encode) if any(texts) else encode()
    reply = CompletionReply(
        body=body,
        model=body.model or service.llm.names[0],
        tokenizer=tokenizer,
        texts=texts,
    )
    return await answer(request, service.stream(ids, params, entry), reply)


async def chat(request: Request) -> Response:
    body = await read(request, ChatBody)
    try:
        return await _chat(request, body)
    except ParameterError as error:
        raise body.in_own_words(error) from None


async def _chat(request: Request, body: ChatBody) -> Response:
    service = service_of(request)
    params = body.params()
    entry = await service.find(body.model, body.lora_path)
    ids = await asyncio.to_thread(encode_chat, service, body, entry, bool(body.add_special_tokens))
    reply = ChatReply(
        body=body,
        model=body.model or service.llm.names[0],
        tokenizer=service.llm.tokenizer_of(entry),
    )
    return await answer(request, service.stream([ids], params, entry), reply)


def encode_chat(
    service: Service, body: Conversation, entry: AdapterEntry | None, special: bool
) -> list[int]:
    """Token ids of a conversation, through the adapter's template where it has one."""
    variables = body.chat_template_kwargs or {}
    if taken := {"messages", "add_generation_prompt", "tools", "documents"} & set(variables):
        raise ParameterError(
            f"chat_template_kwargs must not set {sorted(taken)[0]!r}", "chat_template_kwargs"
        )
    tokenizer = service.llm.tokenizer_of(entry)
    text = tokenizer.render_chat(
        [message.flat() for message in body.messages],
        template=template_of(entry),
        **render_options(body),
    )
    return tokenizer.encode(text, add_special_tokens=special)


async def answer(request: Request, stream: Stream, reply: Reply) -> Response:
    """The reply to a request that runs, whole or streamed."""
    service = service_of(request)
    handed_on = False
    try:
        if not reply.body.stream:
            await attend(request.receive, service.finish(stream))
            return Json(reply.whole(stream))
        # Nothing is sent before the first token: what fails until then still gets its own status.
        first = await attend(request.receive, service.next(stream))
        response = event_stream(service, stream, reply, first)
        handed_on = True
        return response
    finally:
        if not handed_on:
            service.close(stream)


def event_stream(service: Service, stream: Stream, reply: Reply, first: list[Delta]) -> EventStream:
    """The stream as server-sent events."""
    options = reply.body.stream_options or StreamOptions()

    def chunk(value: dict[str, Any]) -> bytes:
        if options.include_usage:
            value["usage"] = usage_of(stream) if options.continuous_usage_stats else None
        return event(value)

    def events(deltas: list[Delta]) -> bytes:
        return b"".join([chunk(reply.chunk(delta, stream)) for delta in deltas])

    def head() -> bytes:
        return b"".join([chunk(value) for value in reply.first_chunks(stream)])

    def tail() -> bytes:
        return event(reply.usage_chunk(stream)) if options.include_usage else b""

    return EventStream(service, stream, first, events, head=head, tail=tail)


def model_cards(service: Service) -> list[dict[str, Any]]:
    """vLLM's cards: the base model's names first, then the adapters in load order."""
    llm = service.llm
    cards = [
        _card(service, name, root=llm.parts.path, parent=None, limit=llm.engine.max_model_len)
        for name in llm.names
    ]
    for adapter in llm.store.adapters():
        name, root = str(adapter["name"]), str(adapter["path"])
        cards.append(_card(service, name, root=root, parent=llm.names[0], limit=None))
    return cards


def _card(
    service: Service, name: str, *, root: str, parent: str | None, limit: int | None
) -> dict[str, Any]:
    created = service.created
    permission = {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "jlora",
        "root": root,
        "parent": parent,
        "max_model_len": limit,
        "permission": [permission],
    }


async def models(request: Request) -> Response:
    return Json({"object": "list", "data": model_cards(service_of(request))})


async def model(request: Request) -> Response:
    """One card; base, adapter, and `base:adapter` names are all found."""
    service = service_of(request)
    wanted = request.path_params["model"]
    entry = service.llm.resolve(wanted)
    name = wanted if entry is None else entry.name
    for card in model_cards(service):
        if card["id"] == name:
            return Json(card)
    raise UnknownModelError(f"The model `{wanted}` does not exist.")


def _is_chat(data: bytes) -> bool:
    """Whether a tokenize body has messages; a body that is no JSON is left to the parser."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "messages" in value


async def tokenize(request: Request) -> Response:
    service = service_of(request)
    data = await read_body(request, service.options.max_body_bytes)

    def encode() -> tuple[Body, list[int], Tokenizer]:
        if _is_chat(data):
            body = parse_body(TokenizeChatBody, data)
            entry = service.resolve(body.model)
            ids = encode_chat(service, body, entry, body.add_special_tokens)
            return body, ids, service.llm.tokenizer_of(entry)
        text = parse_body(TokenizeBody, data)
        tokenizer = service.llm.tokenizer_of(service.resolve(text.model))
        ids = tokenizer.encode(text.prompt, add_special_tokens=text.add_special_tokens)
        return text, ids, tokenizer

    body, ids, tokenizer = await asyncio.to_thread(encode)
    wanted = getattr(body, "return_token_strs", False)
    names = [tokenizer.token_text(i) for i in ids] if wanted else None
    return Json(
        {
            "count": len(ids),
            "max_model_len": service.llm.engine.max_model_len,
            "tokens": ids,
            "token_strs": names,
        }
    )


async def detokenize(request: Request) -> Response:
    service = service_of(request)
    body = await read(request, DetokenizeBody)
    entry = await service.find(body.model)
    vocab = service.llm.vocab_of(entry)
    for token in body.tokens:
        if not 0 <= token < vocab:
            raise ParameterError(f"token id {token} is outside the vocabulary of {vocab}", "tokens")
    text = service.llm.tokenizer_of(entry).decode(body.tokens, skip_special_tokens=False)
    return Json({"prompt": text})
