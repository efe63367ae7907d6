"""Request body of SGLang's POST /generate."""

from typing import Any, ClassVar

from pydantic import Field, StrictBool

from jlora.engine.params import SamplingParams
from jlora.errors import ParameterError
from jlora.server.body import Body
from jlora.server.protocol import MAX_N, stop_strings, token_keys


class SGLangSampling(Body):
    """`sampling_params` of SGLang's /generate."""

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: StrictBool = False
    skip_special_tokens: StrictBool = True
    spaces_between_special_tokens: StrictBool = True
    no_stop_trim: StrictBool = False
    n: int = Field(default=1, ge=1, le=MAX_N)
    logit_bias: dict[str, float] | None = None
    sampling_seed: int | None = None
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    structural_tag: Any = None
    stop_regex: Any = None
    custom_params: Any = None

    NULL_COUNTS: ClassVar[frozenset[str]] = frozenset(
        {"max_new_tokens"}
    )  # until the context is full

    def params(self, *, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        for name in (
            "json_schema",
            "regex",
            "ebnf",
            "structural_tag",
            "stop_regex",
            "custom_params",
        ):
            if getattr(self, name) not in (None, {}, []):
                raise ParameterError(
                    f"sampling_params.{name} is not supported by this server",
                    f"sampling_params.{name}",
                )
        if self.max_new_tokens == 0 and prompt_logprobs is None:
            prompt_logprobs = 0
        return SamplingParams(
            n=self.n,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=self.sampling_seed,
            stop=stop_strings(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            max_tokens=self.max_new_tokens,
            min_tokens=self.min_new_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            logit_bias=token_keys(self.logit_bias),
            skip_special_tokens=self.skip_special_tokens,
            include_stop_str_in_output=self.no_stop_trim,
        )


class SGLangBody(Body):
    """POST /generate"""

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: SGLangSampling | list[SGLangSampling] | None = None
    lora_path: str | list[str | None] | None = None
    stream: StrictBool = False
    return_logprob: StrictBool | None = False
    logprob_start_len: int | None = -1
    top_logprobs_num: int | None = 0
    return_text_in_logprobs: StrictBool = False
    rid: str | list[str] | None = None
    image_data: Any = None
    audio_data: Any = None
    video_data: Any = None
    input_embeds: Any = None
    token_ids_logprob: Any = None
    modalities: Any = None
    return_hidden_states: StrictBool = False
    log_metrics: StrictBool = True
    custom_logit_processor: Any = None
    session_params: Any = None
    bootstrap_host: Any = None
    bootstrap_port: Any = None
    bootstrap_room: Any = None
    priority: int | None = None
    extra_key: Any = None

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        **dict.fromkeys(
            (
                "image_data",
                "audio_data",
                "video_data",
                "input_embeds",
                "token_ids_logprob",
                "custom_logit_processor",
                "session_params",
                "bootstrap_host",
                "bootstrap_port",
                "bootstrap_room",
                "extra_key",
            ),
            ([], {}),
        ),
        "return_hidden_states": (False,),
        "priority": (0,),
    }
