"""Request bodies of the OpenAI and vLLM routes: JSON -> checked fields -> `SamplingParams`.

Every documented field is known here. One that would change the answer and that we do not have is a
400 that names it, unless it holds the value that changes nothing; an unknown field is a 400 too.
"""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, field_validator

from jlora.engine.params import SamplingParams
from jlora.errors import ParameterError
from jlora.server.body import Body

MAX_N = 128
MAX_PROMPTS = 4096
MAX_CHOICES = 8192
MAX_STOPS = 64


class StreamOptions(Body):
    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False
    include_obfuscation: StrictBool = False


def _mix_name(value: Any) -> Any:
    """`{"a": 0.7, "b": 0.3}` as the mix `a*0.7+b*0.3`."""
    if not isinstance(value, dict):
        return value
    numbers = all(isinstance(w, int | float) and not isinstance(w, bool) for w in value.values())
    if not value or not numbers:
        raise ValueError('a mix is an object of adapter names and weights, such as {"a": 0.7}')
    return "+".join(f"{name}*{weight!r}" for name, weight in value.items())


ModelName = Annotated[str | None, BeforeValidator(_mix_name)]
"""A name, a mix such as "a*0.7+b*0.3", or the mix as an object."""


class Generation(Body):
    """Fields that completions and chat share: OpenAI's, vLLM's extras, SGLang's `lora_path`."""

    model: ModelName = None
    lora_path: str | None = None
    n: int = Field(default=1, ge=1, le=MAX_N)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: StrictBool = False
    include_stop_str_in_output: StrictBool = False
    skip_special_tokens: StrictBool = True
    spaces_between_special_tokens: StrictBool = True
    prompt_logprobs: int | None = None
    echo: StrictBool = False
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    add_special_tokens: StrictBool | None = None
    return_tokens_as_token_ids: StrictBool | None = False
    return_token_ids: StrictBool | None = False
    request_id: str | None = Field(default=None, max_length=256)
    # These change nothing about the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    priority: int = 0
    best_of: int | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_decoding_backend: Any = None
    guided_whitespace_pattern: Any = None
    use_beam_search: StrictBool = False
    length_penalty: float = 1.0
    early_stopping: StrictBool = False
    truncate_prompt_tokens: int | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logits_processors: list[Any] | None = None
    cache_salt: str | None = None
    kv_transfer_params: dict[str, Any] | None = None
    vllm_xargs: dict[str, Any] | None = None

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "response_format": ({"type": "text"},),
        "structured_outputs": ({},),
        **dict.fromkeys(
            (
                "guided_json",
                "guided_regex",
                "guided_choice",
                "guided_grammar",
                "guided_decoding_backend",
                "guided_whitespace_pattern",
                "truncate_prompt_tokens",
                "cache_salt",
                "kv_transfer_params",
            ),
            (),
        ),
        "use_beam_search": (False,),
        "length_penalty": (1.0,),
        "early_stopping": (False,),
        "priority": (0,),
        "allowed_token_ids": ([],),
        "bad_words": ([],),
        "logits_processors": ([],),
        "vllm_xargs": ({},),
    }

    def sampling(self, *, logprobs: int | None, max_tokens: int | None) -> SamplingParams:
        """The engine's parameters; what is null takes the default."""
        if self.best_of not in (None, self.n):
            raise ParameterError(f"best_of must equal n={self.n}, got {self.best_of}", "best_of")
        if self.stream_options is not None and not self.stream:
            raise ParameterError("stream_options needs stream=true", "stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise ParameterError("prompt_logprobs cannot be streamed", "prompt_logprobs")
        prompt_logprobs = self.prompt_logprobs
        if prompt_logprobs is None and self.echo:
            prompt_logprobs = logprobs
        if max_tokens == 0 and prompt_logprobs is None:
            prompt_logprobs = 0  # the engine generates nothing only for requests that score
        optional = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        )
        given = {name: value for name in optional if (value := getattr(self, name)) is not None}
        return SamplingParams(
            n=self.n,
            seed=self.seed,
            stop=stop_strings(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            logit_bias=token_keys(self.logit_bias),
            skip_special_tokens=self.skip_special_tokens,
            include_stop_str_in_output=self.include_stop_str_in_output,
            **given,
        )


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    """One stop string or several as a tuple."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise ParameterError(f"stop may hold {MAX_STOPS} strings at most, got {len(stops)}", "stop")
    return stops


def token_keys(bias: dict[str, float] | None) -> dict[int, float] | None:
    """JSON object keys as token ids."""
    if not bias:
        return None
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise ParameterError(
                f"logit_bias keys must be token ids, got {key[:80]!r}", "logit_bias"
            )
    return {int(key): value for key, value in bias.items()}


class CompletionBody(Generation):
    """POST /v1/completions"""

    prompt: Any
    logprobs: int | None = None
    suffix: str | None = None

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {**Generation.UNSUPPORTED, "suffix": ("",)}

    @field_validator("prompt")
    @classmethod
    def _known_form(cls, value: Any) -> str | list[str] | list[int] | list[list[int]]:
        return check_prompt(value)

    def params(self) -> SamplingParams:
        max_tokens = 16 if self.max_tokens is None else self.max_tokens
        return self.sampling(logprobs=self.logprobs, max_tokens=max_tokens)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One prompt or many as a list."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        prompts: list[Any] = [self.prompt] if one else list(self.prompt)
        if len(prompts) > MAX_PROMPTS or len(prompts) * self.n > MAX_CHOICES:
            raise ParameterError(
                f"at most {MAX_PROMPTS} prompts and {MAX_CHOICES} choices in one request, "
                f"got {len(prompts)} prompts with n={self.n}",
                "prompt",
            )
        return prompts


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_prompt(value: Any) -> Any:
    """A text, a list of texts, a list of token ids or a list of such lists; ValueError otherwise."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value) or all(map(_is_token, value)):
            return value
        if all(isinstance(item, list) and all(map(_is_token, item)) for item in value):
            return value
    raise ValueError("must be text, a list of texts, a list of token ids or a list of such lists")


class Message(BaseModel):
    """One turn of a conversation; keys that we do not know go to the template as they are."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None

    def flat(self) -> dict[str, Any]:
        """The message for the template: its text parts joined, other kinds of parts refused."""
        message = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            for part in self.content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise ParameterError(
                        f"messages: content parts must be of type 'text', got {part.get('type')!r}",
                        "messages",
                    )
            message["content"] = "\n".join(part["text"] for part in self.content)
        message.setdefault("content", "")
        return message


class Conversation(Body):
    """What chat and tokenize need to render a conversation."""

    messages: list[Message] = Field(min_length=1)
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None


CHAT_UNSUPPORTED: dict[str, tuple[Any, ...]] = {"tools": ([],), "chat_template": ()}


def render_options(body: Any) -> dict[str, Any]:
    """Keyword arguments for `Tokenizer.render_chat`."""
    return {
        "add_generation_prompt": body.add_generation_prompt and not body.continue_final_message,
        "continue_final_message": body.continue_final_message,
        "variables": body.chat_template_kwargs,
    }


class ChatBody(Generation, Conversation):
    """POST /v1/chat/completions"""

    logprobs: StrictBool | None = False
    top_logprobs: int | None = Field(default=None, ge=0)
    max_completion_tokens: int | None = None
    # These change nothing about the answer of a text model without tools.
    parallel_tool_calls: StrictBool | None = None
    service_tier: str | None = None
    store: StrictBool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prediction: dict[str, Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    documents: list[Any] | None = None
    modalities: list[str] | None = None
    audio: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: Any = None
    include_reasoning: StrictBool = True
    mm_processor_kwargs: dict[str, Any] | None = None

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        **Generation.UNSUPPORTED,
        **CHAT_UNSUPPORTED,
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "documents": ([],),
        "modalities": (["text"],),
        "audio": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "web_search_options": (),
        "mm_processor_kwargs": ({},),
    }

    def params(self) -> SamplingParams:
        if self.top_logprobs and not self.logprobs:
            raise ParameterError("top_logprobs needs logprobs=true", "top_logprobs")
        if self.echo:
            raise ParameterError("echo is not supported in chat; use /v1/completions", "echo")
        limit = (
            self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        )
        if limit == 0:
            raise ParameterError("max_tokens must be at least 1 in a chat, got 0", "max_tokens")
        return self.sampling(
            logprobs=(self.top_logprobs or 0) if self.logprobs else None, max_tokens=limit
        )

    def in_own_words(self, error: ParameterError) -> ParameterError:
        """An error of the engine's about the field that a chat has for it. Its text starts with the name."""
        names = {"logprobs": "top_logprobs"}
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        own = names.get(error.param or "")
        if own is None or getattr(self, own) is None:
            return error
        return ParameterError(own + str(error).removeprefix(error.param or ""), own)


class TokenizeBody(Body):
    """POST /tokenize with a prompt"""

    model: ModelName = None
    prompt: str
    add_special_tokens: StrictBool = True
    return_token_strs: StrictBool | None = False


class TokenizeChatBody(Conversation):
    """POST /tokenize with messages"""

    model: ModelName = None
    add_special_tokens: StrictBool = False
    return_token_strs: StrictBool | None = False

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = CHAT_UNSUPPORTED


class DetokenizeBody(Body):
    """POST /detokenize"""

    model: ModelName = None
    tokens: list[int]


class LoadBody(Body):
    """POST /v1/load_lora_adapter (vLLM's names, SageMaker's `name` and `src`) and SGLang's load."""

    lora_name: str | None = None
    lora_path: str | None = None
    name: str | None = None
    src: str | None = None
    load_inplace: StrictBool = False
    pinned: StrictBool = False
    is_3d_lora_weight: StrictBool | None = False
    lora_id: str | None = None
    base_model_name: str | None = None

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {"is_3d_lora_weight": (False,)}

    @property
    def adapter(self) -> str:
        return self.lora_name or self.name or ""

    @property
    def path(self) -> str:
        return self.lora_path or self.src or ""


class UnloadBody(Body):
    """POST /v1/unload_lora_adapter and SGLang's unload"""

    lora_name: str | None = None
    name: str | None = None
    lora_int_id: int | None = None
    lora_id: str | None = None

    @property
    def adapter(self) -> str:
        return self.lora_name or self.name or ""
