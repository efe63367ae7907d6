"""What `LLM.generate` and `LLM.chat` take and give, in vLLM's Python shape."""

from dataclasses import dataclass

from jlora.errors import ParameterError


@dataclass(frozen=True)
class LoRARequest:
    """Which adapter a prompt wants. A name that is not loaded yet is loaded from `lora_path`."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ParameterError(
                f"lora_int_id must be at least 1, got {self.lora_int_id}", "lora_int_id"
            )


@dataclass(frozen=True, kw_only=True)
class Logprob:
    """One token's logprob, its rank in the vocabulary (1 is the likeliest) and its text."""

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One sample of one prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None
    lora_request: LoRARequest | None = None


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """Everything about one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    lora_request: LoRARequest | None
    num_cached_tokens: int
