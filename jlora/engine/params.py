"""What a request asks of the sampler: vLLM's names, defaults and limits, checked once at the door.

Nothing here knows a model: limits that depend on the server are in `EngineConfig.check_request`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jlora.errors import ParameterError

MAX_LOGIT_BIAS = 512
MAX_STOP_TOKENS = 64
MIN_TEMPERATURE = 0.01
"""A smaller temperature above 0 is raised to this one, as vLLM does: logits / 1e-6 overflow."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a generation ends. Every wrong value is a `ParameterError`."""

    n: int = 1
    """Completions of one prompt; the engine sees n requests."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Mass of the nucleus, in (0, 1]."""
    top_k: int = 0
    """How many of the likeliest tokens stay; 0 or -1 is all of them."""
    min_p: float = 0.0
    """Least probability that stays, as a share of the likeliest token's."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that was generated, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """The same, times how often it was generated."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens of the prompt and the output."""
    seed: int | None = None
    """Makes this request's draws repeatable."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; found by the text layer, which then aborts the request."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the generation."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence token."""
    max_tokens: int | None = 16
    """New tokens at most; None: until the context is full; 0: only score the prompt."""
    min_tokens: int = 0
    """No end-of-sequence or stop token before this many new tokens."""
    logprobs: int | None = None
    """Log-probabilities of the sampled token and of this many likeliest ones."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    logit_bias: dict[int, float] | None = None
    """Token id to what is added to its logit, clamped to [-100, 100] as vLLM does."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    include_stop_str_in_output: bool = False
    """Keep the stop string in the text."""

    def __post_init__(self) -> None:
        _normalise(self)
        _integer("n", self.n, 1)
        _number("temperature", self.temperature, 0.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise ParameterError(f"top_p must be in (0, 1], got {self.top_p}", param="top_p")
        _integer("top_k", self.top_k, -1)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0)
        if self.repetition_penalty == 0:
            raise ParameterError(
                "repetition_penalty must be greater than 0, got 0", param="repetition_penalty"
            )
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ParameterError(
                    f"{name} must be true or false, got {getattr(self, name)!r}", param=name
                )
        self._check_stops()
        self._check_lengths()
        _check_logit_bias(self.logit_bias)
        if self.greedy and self.n > 1:
            raise ParameterError(
                f"n must be 1 when temperature is 0 (all answers would be equal), got {self.n}",
                param="n",
            )
        if 0 < self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", MIN_TEMPERATURE)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def scores_only(self) -> bool:
        """Nothing is generated: the request wants its prompt's log-probabilities."""
        return self.max_tokens == 0

    def _check_stops(self) -> None:
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ParameterError(
                    f"stop must hold non-empty strings, got {text!r}", param="stop"
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise ParameterError(
                f"stop_token_ids may hold {MAX_STOP_TOKENS} tokens at most, "
                f"got {len(self.stop_token_ids)}",
                param="stop_token_ids",
            )
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)

    def _check_lengths(self) -> None:
        _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is None:
            return
        _integer("max_tokens", self.max_tokens, 0)
        if self.scores_only and self.prompt_logprobs is None:
            raise ParameterError(
                "max_tokens must be at least 1 unless prompt_logprobs asks to score the prompt, got 0",
                param="max_tokens",
            )
        if self.min_tokens > self.max_tokens:
            raise ParameterError(
                f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}",
                param="min_tokens",
            )


def _normalise(params: SamplingParams) -> None:
    """Lists become tuples and one stop string a tuple of one; seed -1 is no seed (vLLM's habit)."""
    for name in ("stop", "stop_token_ids"):
        value = getattr(params, name)
        if isinstance(value, str):
            value = (value,)
        if value is None:
            value = ()
        if not isinstance(value, list | tuple):
            raise ParameterError(f"{name} must be a list, got {value!r}", param=name)
        object.__setattr__(params, name, tuple(value))
    if params.seed == -1 and not isinstance(params.seed, bool):
        object.__setattr__(params, "seed", None)
    if isinstance(params.logit_bias, Mapping):
        clamped = {
            token: min(100.0, max(-100.0, bias)) if _is_finite(bias) else bias
            for token, bias in params.logit_bias.items()
        }
        object.__setattr__(params, "logit_bias", clamped)


def _check_logit_bias(bias: dict[int, float] | None) -> None:
    if bias is None:
        return
    if not isinstance(bias, Mapping):
        raise ParameterError(
            f"logit_bias must map token ids to numbers, got {bias!r}", param="logit_bias"
        )
    if len(bias) > MAX_LOGIT_BIAS:
        raise ParameterError(
            f"logit_bias may hold {MAX_LOGIT_BIAS} tokens at most, got {len(bias)}",
            param="logit_bias",
        )
    for token, value in bias.items():
        _integer("logit_bias", token, 0)
        if not _is_finite(value):
            raise ParameterError(
                f"logit_bias of token {token} must be a finite number, got {value!r}",
                param="logit_bias",
            )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _integer(name: str, value: object, least: int, most: int | None = None) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not ok or (most is not None and value > most):  # pyright: ignore[reportOperatorIssue]
        limit = f"at least {least}" if most is None else f"in [{least}, {most}]"
        raise ParameterError(f"{name} must be an integer {limit}, got {value!r}", param=name)


def _number(name: str, value: object, least: float, most: float | None = None) -> None:
    ok = _is_finite(value) and value >= least  # pyright: ignore[reportOperatorIssue]
    if not ok or (most is not None and value > most):  # pyright: ignore[reportOperatorIssue]
        limit = f"of at least {least:g}" if most is None else f"in [{least:g}, {most:g}]"
        raise ParameterError(f"{name} must be a finite number {limit}, got {value!r}", param=name)
