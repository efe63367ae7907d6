"""Who hears about each request: `Clients` turns what a step gave into events.

Events are emitted on the engine's thread; a client's own fault is logged and touches nobody else.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from jlora.engine.runner import Result
from jlora.engine.sequence import Event, Sequence, TokenLogprobs

log = logging.getLogger(__name__)

OnEvent = Callable[[Event], None]
Bell = Callable[[], None]


@dataclass
class Client:
    """Where the events of a request go, and what it was told of its prompt."""

    seq: Sequence
    on_event: OnEvent
    bell: Bell | None = None
    """Rung when there were events, once for all clients that share it."""
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    scored: bool = False
    """The prompt's log-probabilities were sent."""
    uid: str | None = None
    """The content of its adapter when it first ran."""

    def take_prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """What the next event says about the prompt: everything once, then nothing."""
        if self.seq.params.prompt_logprobs is None or self.scored:
            return None
        self.scored = True
        return self.prompt_logprobs


class Clients(dict[str, Client]):
    """Clients by request id, from the start of a request to its last event."""

    def __init__(self) -> None:
        super().__init__()
        self._bells: set[Bell] = set()

    def send_token(self, seq: Sequence, result: Result, *, last: bool) -> None:
        client = self.get(seq.request_id)
        if client is None:
            return
        logprobs = result.logprobs.get(seq.request_id)
        if last:
            del self[seq.request_id]
        self.emit(
            client,
            Event(
                request_id=seq.request_id,
                token_ids=(result.tokens[seq.request_id],),
                logprobs=None if logprobs is None else [logprobs],
                prompt_logprobs=client.take_prompt_logprobs(),
                finish_reason=seq.finish_reason if last else None,
                stop_reason=seq.stop_reason,
                num_cached_tokens=seq.num_cached,
                queue_seconds=seq.queue_seconds,
            ),
        )

    def close(self, seq: Sequence) -> None:
        """The last event of a request that ends without a token."""
        client = self.pop(seq.request_id, None)
        if client is not None:
            self.emit(
                client,
                Event(
                    request_id=seq.request_id,
                    prompt_logprobs=client.take_prompt_logprobs(),
                    finish_reason=seq.finish_reason,
                    num_cached_tokens=seq.num_cached,
                    queue_seconds=seq.queue_seconds,
                    error=seq.error,
                ),
            )

    def emit(self, client: Client, event: Event) -> None:
        try:
            client.on_event(event)
        except Exception:  # a client's fault must not touch the others
            log.exception("request %s: its on_event failed", event.request_id)
        if client.bell is not None:
            self._bells.add(client.bell)

    def ring(self) -> None:
        """Tells whoever reads that there are events."""
        for bell in self._bells:
            try:
                bell()
            except Exception:
                log.exception("a bell failed")
        self._bells.clear()
