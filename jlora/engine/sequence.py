"""One generation as the host sees it, and the events that leave the engine for it.

A `Sequence` is changed by the scheduler only, on the engine's thread. `Event` is frozen and may
cross threads.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, NamedTuple

from jlora.engine.params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(kw_only=True, eq=False)
class Sequence:
    """One generation. What it will have computed when all dispatched steps are done:

    tokens     p p p p p o o          known: prompt, then output
    in flight                 ?       sampled by a dispatched step, not read yet
    num_computed = 7                  KV of all known tokens; the next row's input is the `?`
    """

    request_id: str
    prompt: list[int]
    params: SamplingParams
    adapter: Any = None
    """The store's entry of its adapter (compared by identity), or None for the base model."""
    eos_ids: Collection[int] = ()
    arrival: float = 0.0
    seed: int = 0
    """Of its random draws; with a token's position it decides the draw."""
    tokens: list[int] = field(default_factory=list)
    """Prompt and the output known so far; starts as a copy of the prompt."""

    status: Status = Status.WAITING
    slot: int | None = None
    """Row of the device's per-sequence state, below max_num_seqs; held while running."""
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens whose KV is computed or dispatched."""
    in_flight: int = 0
    """Sampled tokens dispatched but not read: 0 or 1 when a step is scheduled, 2 just after."""
    num_cached: int = 0
    """Prompt tokens that the prefix cache gave at the first admission."""
    preemptions: int = 0
    queue_seconds: float | None = None
    """From arrival to the first admission."""

    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id that ended it; None after end-of-sequence or a limit."""
    error: str | None = None

    # The scheduler's own notes.
    order: int = 0
    """Place in the order of arrival; unlike `arrival` never equal for two sequences."""
    steps: int = 0
    """Dispatched steps not committed yet; its memory may only be freed at 0."""
    prefill_end: int = 0
    """Tokens that the prefill of this admission covers; after them it decodes."""
    cache_uid: str | None = None
    """Whose KV its pages hold: the adapter's uid when it was admitted."""

    def __post_init__(self) -> None:
        if not self.tokens:
            self.tokens = list(self.prompt)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def prefilling(self) -> bool:
        return self.num_computed < self.prefill_end

    def may_sample(self, max_model_len: int) -> bool:
        """Whether one more token may be asked for, counting those in flight."""
        count, limit = len(self.tokens) + self.in_flight, self.params.max_tokens
        return count < max_model_len and (limit is None or count - len(self.prompt) < limit)

    def append(self, token: int, max_model_len: int) -> None:
        """Take a sampled token and set `finish_reason` if it is the last one."""
        self.tokens.append(token)
        params, count = self.params, len(self.tokens)
        output = count - len(self.prompt)
        if output >= params.min_tokens:
            if token in self.eos_ids and not params.ignore_eos:
                self.finish_reason = "stop"
                return
            if token in params.stop_token_ids:
                self.finish_reason, self.stop_reason = "stop", token
                return
        limit = params.max_tokens
        if count >= max_model_len or (limit is not None and output >= limit):
            self.finish_reason = "length"


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """One position: the token that stands there, and the likeliest ones."""

    token: int
    logprob: float
    rank: int
    """1 for the likeliest token of the vocabulary."""
    top: dict[int, float]
    """Token id to log-probability, likeliest first."""


class Event(NamedTuple):  # one for each token: a frozen dataclass takes twice as long to make
    """What the engine says about a request; the last one has a `finish_reason`."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: list[TokenLogprobs] | None = None
    """One for each of `token_ids`, if they were asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One for each token of the prompt, None for the first; sent once, with the first event."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    queue_seconds: float | None = None
    """How long the request waited before its first step; None if it never had one."""
    error: str | None = None
