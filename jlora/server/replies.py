"""Deltas and finished choices -> the JSON of OpenAI's completions and chat (with vLLM's extras).

Pure: no sockets, no clocks. A reply object belongs to one request and remembers what its chunks
have in common.
"""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from jlora.engine.sequence import TokenLogprobs
from jlora.server.protocol import ChatBody, CompletionBody
from jlora.stream import Choice, Delta, Stream
from jlora.tokenizer import Tokenizer

LOWEST = -9999.0
"""JSON has no minus infinity and no NaN; vLLM sends this."""


def shown(logprob: float) -> float:
    """A log-probability as JSON can hold it; an adapter that overflows makes NaN of its own."""
    return logprob if logprob > LOWEST else LOWEST


def usage_of(stream: Stream) -> dict[str, Any]:
    prompt, completion = stream.prompt_tokens, stream.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": stream.cached_tokens},
    }


@dataclass(kw_only=True)
class Names:
    """How tokens are shown in logprobs."""

    tokenizer: Tokenizer
    as_ids: bool = False

    def text(self, token: int) -> str:
        """The token's text; where its bytes are no whole character, OpenAI's `bytes:\\xe2\\x80`, so
        that different tokens never share a name."""
        if self.as_ids:
            return f"token_id:{token}"
        data = self.tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def by_id(self, scores: list[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: for each position token id -> logprob, rank and text."""
        return [None if score is None else self._position(score) for score in scores]

    def _position(self, score: TokenLogprobs) -> dict[str, Any]:
        ranks = {token: i for i, token in enumerate(score.top, start=1)} | {score.token: score.rank}
        values = {score.token: score.logprob} | score.top
        return {
            str(token): {
                "logprob": shown(value),
                "rank": ranks[token],
                "decoded_token": self.tokenizer.token_text(token),
            }
            for token, value in values.items()
        }


@dataclass(kw_only=True)
class CompletionReply:
    """JSON of POST /v1/completions. `texts` are the prompts that came as text, for `echo`."""

    body: CompletionBody
    model: str
    tokenizer: Tokenizer
    texts: list[str | None]
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._names = Names(
            tokenizer=self.tokenizer, as_ids=bool(self.body.return_tokens_as_token_ids)
        )
        self._offsets: dict[int, int] = {}  # choice -> length of the text that was shown already
        self._echoed: set[int] = set()

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }

    def first_chunks(self, stream: Stream) -> list[dict[str, Any]]:
        return []

    def _echo(self, choice: Choice) -> tuple[str, list[int], list[TokenLogprobs | None]]:
        """The prompt's text, tokens and scores, in front of the completion's."""
        text = self.texts[choice.index // self.body.n]
        if text is None:
            text = self.tokenizer.decode(choice.prompt_ids, skip_special_tokens=False)
        scores: list[TokenLogprobs | None] = [None] * len(choice.prompt_ids)
        if choice.prompt_logprobs is not None:
            scores = choice.prompt_logprobs
        return text, choice.prompt_ids, scores

    def chunk(self, delta: Delta, stream: Stream) -> dict[str, Any]:
        """One SSE chunk."""
        text, tokens = delta.text, delta.token_ids
        scores: list[TokenLogprobs | None] = list(delta.logprobs or ())
        if self.body.echo and delta.index not in self._echoed:
            self._echoed.add(delta.index)
            before, ids, prompt_scores = self._echo(stream.choices[delta.index])
            text, tokens, scores = before + text, ids + tokens, prompt_scores + scores
        choice: dict[str, Any] = {
            "index": delta.index,
            "text": text,
            "logprobs": self._logprobs(delta.index, tokens, scores),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return {**self._head(), "choices": [choice]}

    def usage_chunk(self, stream: Stream) -> dict[str, Any]:
        return {**self._head(), "choices": [], "usage": usage_of(stream)}

    def whole(self, stream: Stream) -> dict[str, Any]:
        """The body of a reply that is not streamed."""
        choices = [self._choice(choice) for choice in stream.choices]
        return {**self._head(), "choices": choices, "usage": usage_of(stream)}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        text, tokens = choice.text, choice.token_ids
        scores: list[TokenLogprobs | None] = list(choice.logprobs)
        if self.body.echo:
            before, ids, prompt_scores = self._echo(choice)
            text, tokens, scores = before + text, ids + tokens, prompt_scores + scores
        result: dict[str, Any] = {
            "index": choice.index,
            "text": text,
            "logprobs": self._logprobs(choice.index, tokens, scores),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self.body.prompt_logprobs is not None and choice.prompt_logprobs is not None:
            result["prompt_logprobs"] = self._names.by_id(choice.prompt_logprobs)
        if self.body.return_token_ids:
            result["token_ids"] = choice.token_ids
            result["prompt_token_ids"] = choice.prompt_ids
        return result

    def _logprobs(
        self, index: int, tokens: list[int], scores: list[TokenLogprobs | None]
    ) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        names = [self._names.text(token) for token in tokens]
        offset = self._offsets.get(index, 0)
        offsets: list[int] = []
        for token in tokens:
            offsets.append(offset)
            offset += len(self.tokenizer.token_text(token))
        self._offsets[index] = offset
        return {
            "tokens": names,
            "token_logprobs": [None if x is None else shown(x.logprob) for x in scores],
            "top_logprobs": [self._top(x) for x in scores],
            "text_offset": offsets,
        }

    def _top(self, score: TokenLogprobs | None) -> dict[str, float] | None:
        """The likeliest tokens and, as OpenAI does, the token itself."""
        if score is None:
            return None
        limit = self.body.logprobs or 0
        top = dict(list(score.top.items())[:limit])
        result: dict[str, float] = {}
        for token, value in (*top.items(), (score.token, score.logprob)):
            result.setdefault(self._names.text(token), shown(value))
        return result


@dataclass(kw_only=True)
class ChatReply:
    """JSON of POST /v1/chat/completions."""

    body: ChatBody
    model: str
    tokenizer: Tokenizer
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._names = Names(
            tokenizer=self.tokenizer, as_ids=bool(self.body.return_tokens_as_token_ids)
        )

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def first_chunks(self, stream: Stream) -> list[dict[str, Any]]:
        """One chunk for each choice that says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [
            {
                **self._head("chat.completion.chunk"),
                "choices": [
                    {"index": c.index, "delta": delta, "logprobs": None, "finish_reason": None}
                ],
            }
            for c in stream.choices
        ]

    def chunk(self, delta: Delta, stream: Stream) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": delta.index,
            "delta": {"content": delta.text},
            "logprobs": self._logprobs(delta.logprobs),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self.body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, stream: Stream) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage_of(stream)}

    def whole(self, stream: Stream) -> dict[str, Any]:
        first = stream.choices[0]
        result: dict[str, Any] = {
            **self._head("chat.completion"),
            "choices": [self._choice(choice) for choice in stream.choices],
            "usage": usage_of(stream),
        }
        if self.body.prompt_logprobs is not None and first.prompt_logprobs is not None:
            result["prompt_logprobs"] = self._names.by_id(first.prompt_logprobs)
        if self.body.return_token_ids:
            result["prompt_token_ids"] = first.prompt_ids
        return result

    def _choice(self, choice: Choice) -> dict[str, Any]:
        result: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self.body.return_token_ids:
            result["token_ids"] = choice.token_ids
        return result

    def _logprobs(self, scores: list[TokenLogprobs] | None) -> dict[str, Any] | None:
        if not self.body.logprobs or scores is None:
            return None
        limit = self.body.top_logprobs or 0
        return {
            "content": [
                {
                    **self._entry(score.token, score.logprob),
                    "top_logprobs": [
                        self._entry(token, value)
                        for token, value in list(score.top.items())[:limit]
                    ],
                }
                for score in scores
            ],
            "refusal": None,
        }

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        return {
            "token": self._names.text(token),
            "logprob": shown(value),
            "bytes": list(self.tokenizer.token_bytes(token)),
        }
