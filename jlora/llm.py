"""`LLM`: prompts and conversations in, text out, in vLLM's Python shape; and `LLM.stream`, the text
layer that the server runs on.

Importing this module imports no jax; loading a model does.
"""

import dataclasses
import itertools
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jlora.adapters.store import AdapterEntry
from jlora.console import prepare_devices
from jlora.engine.params import SamplingParams
from jlora.engine.sequence import Event, TokenLogprobs
from jlora.errors import ParameterError, UnknownModelError
from jlora.near import near
from jlora.options import ModelOptions
from jlora.outputs import CompletionOutput, Logprob, LoRARequest, RequestOutput
from jlora.parts import InPlaceLike, Parts, Progress
from jlora.stream import Choice, Stream, Waker
from jlora.tokenizer import Tokenizer

Prompt = str | Sequence[int] | dict[str, Any]
_counter = itertools.count()


class LLM:
    """A base model with adapters.

    `LLM(model="folder", lora_modules=["pirate=folder"], max_num_seqs=8)` takes the fields of
    `ModelOptions`, by the names of vLLM's and SGLang's flags too, such as `tensor_parallel_size`;
    without a model it is the embedded SmolLM2 with its demo adapters.
    """

    def __init__(
        self, model: str | None = None, *, progress: Progress | None = None, **options: Any
    ):
        options = _by_field(options)
        for name in ("lora_modules", "served_model_name", "lora_target_modules"):
            if isinstance(options.get(name), dict):
                options[name] = [f"{key}={value}" for key, value in options[name].items()]
            elif isinstance(options.get(name), str):
                options[name] = [options[name]]
            options[name] = tuple(str(item) for item in options.get(name) or ())
        chosen = ModelOptions(model=model, **options)
        if "jax" not in sys.modules:  # later it would not listen
            prepare_devices(chosen.mesh)
        # Lazy: building imports jax, which the server's tests and --help do without.
        from jlora.build import build_engine

        self._take(build_engine(chosen, progress=progress))

    @classmethod
    def load(cls, options: ModelOptions, *, progress: Progress | None = None) -> "LLM":
        """Build from options that are already parsed (flags, a config file)."""
        from jlora.build import build_engine  # lazy: imports jax

        return cls.from_parts(build_engine(options, progress=progress))

    @classmethod
    def from_parts(cls, parts: Parts) -> "LLM":
        """Stand on an engine that somebody else built."""
        llm = cls.__new__(cls)
        llm._take(parts)
        return llm

    def _take(self, parts: Parts) -> None:
        self.parts = parts
        self.engine = parts.engine
        self.store = parts.store
        self.tokenizer = parts.tokenizer
        self.names = parts.names
        self._loaded: dict[str, LoRARequest] = {}

    def close(self, timeout: float = 0.0) -> None:
        """Stop the engine; requests that still run are cut after `timeout` seconds."""
        self.engine.shutdown(timeout)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get_tokenizer(self, lora_request: LoRARequest | None = None) -> Any:
        """What `transformers.AutoTokenizer` makes of the checkpoint's folder, or of the adapter's where
        it has a tokenizer of its own. `LLM.tokenizer` is what requests are encoded with."""
        from transformers import AutoTokenizer  # lazy: takes seconds, and nothing else needs it

        own = lora_request is not None and Path(lora_request.lora_path, "tokenizer.json").is_file()
        path = lora_request.lora_path if lora_request is not None and own else self.parts.path
        return AutoTokenizer.from_pretrained(path)

    def merge_in_place(self, name: str) -> None:
        """Merge an adapter into the weights: it costs nothing, and nothing else is served meanwhile.

        Running requests end first. UnknownModelError, ConflictError, AdapterError otherwise."""
        self._in_place().merge(self._named(name))

    def unmerge_in_place(self, name: str) -> None:
        """Take a merged adapter out again: the base's weights come back bit for bit."""
        self._in_place().unmerge(self._named(name))

    def _named(self, name: str) -> AdapterEntry:
        entry = self.store.resolve(name, self.names)
        if entry is None:
            raise UnknownModelError(f"The model `{name}` is the base, not an adapter.")
        return entry

    def _in_place(self) -> InPlaceLike:
        assert self.parts.in_place is not None, "this engine cannot merge in place"
        return self.parts.in_place

    def resolve(self, model: str | None) -> AdapterEntry | None:
        """The adapter that a model name means; None is the base model."""
        return self.store.resolve(model, self.names) if model is not None else None

    def stream(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        adapter: AdapterEntry | None = None,
        waker: Waker | None = None,
        request_id: str | None = None,
    ) -> Stream:
        """Start `params.n` generations of each prompt. The caller iterates and must `close()`.

        Prompts that are the same list object count once in the usage.
        """
        request_id = request_id or uuid.uuid4().hex
        choices: list[Choice] = []
        for prompt in prompts:
            checked = self.check(prompt, params, adapter)
            for sample in range(params.n):
                # 31 bits are all that the sampler uses; -2 + 1 must not become -1, "no seed".
                seed = None if params.seed is None else (params.seed + sample) & 0x7FFFFFFF
                choices.append(
                    Choice(
                        index=len(choices),
                        request_id=f"{request_id}-{len(choices)}-{next(_counter)}",
                        prompt_ids=prompt,
                        params=dataclasses.replace(checked, n=1, seed=seed),
                        tokenizer=self.tokenizer_of(adapter),
                    )
                )

        def submit(
            choice: Choice, receive: Callable[[Event], None], bell: Callable[[], None]
        ) -> None:
            self.engine.submit(
                choice.request_id, choice.prompt_ids, choice.params, adapter, receive, bell
            )

        return Stream(
            choices,
            submit=submit,
            abort=self.engine.abort,
            waker=waker,
            adapter=adapter,
        ).start()

    def tokenizer_of(self, adapter: AdapterEntry | None) -> Tokenizer:
        """An adapter's own tokenizer where it brings one, else the base's."""
        return getattr(adapter, "tokenizer", None) or self.tokenizer

    def vocab_of(self, adapter: AdapterEntry | None) -> int:
        """Tokens that a request of this adapter may name."""
        return self.parts.vocab + getattr(adapter, "added_tokens", 0)

    def check(
        self, prompt: Sequence[int], params: SamplingParams, adapter: AdapterEntry | None = None
    ) -> SamplingParams:
        """`params` with max_tokens filled in; ParameterError when prompt and params do not fit the model."""
        self.engine.check(prompt, params, adapter)
        limit = self.engine.max_model_len
        room = limit - len(prompt)
        if params.max_tokens is None:
            return dataclasses.replace(params, max_tokens=room)
        if params.max_tokens > room:
            raise ParameterError(
                f"max_tokens={params.max_tokens} is too large: this model's maximum context length is "
                f"{limit} tokens and the prompt has {len(prompt)}, so at most {room} can follow",
                "max_tokens",
            )
        return params

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt (text, token ids, or vLLM's dict) or many; results keep their order.

        `use_tqdm` is vLLM's and changes nothing: no progress is shown here."""
        if not isinstance(prompts, str | dict | Sequence):
            raise ParameterError(
                f"prompts must be a text, a dict or a list of them, got {prompts!r}", "prompts"
            )
        if isinstance(prompts, str | dict) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]  # type: ignore[list-item]
        texts = [_as_prompt(prompt) for prompt in prompts]
        loras = _loras(lora_request, len(texts))
        ids = [
            self.tokenizer_of(self.adapter_for(lora)).encode(text)
            if isinstance(text, str)
            else list(text)
            for text, lora in zip(texts, loras, strict=True)
        ]
        shown = [text if isinstance(text, str) else None for text in texts]
        return self._run(shown, ids, sampling_params, loras)

    def chat(
        self,
        messages: list[dict[str, Any]] | Sequence[list[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, through the adapter's chat template where it has one."""
        if messages and isinstance(messages[0], dict):
            messages = [messages]  # type: ignore[list-item]
        loras = _loras(lora_request, len(messages))
        prompts: list[str | None] = []
        ids: list[list[int]] = []
        for conversation, lora in zip(messages, loras, strict=True):
            entry = self.adapter_for(lora)
            tokenizer = self.tokenizer_of(entry)
            text = tokenizer.render_chat(
                list(conversation),  # type: ignore[arg-type]
                template=chat_template or template_of(entry),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=chat_template_kwargs,
            )
            prompts.append(text)
            ids.append(tokenizer.encode(text, add_special_tokens=False))
        return self._run(prompts, ids, sampling_params, loras)

    def adapter_for(self, lora: LoRARequest | None) -> AdapterEntry | None:
        """The entry of a LoRARequest; loads it, or reloads it when the id or path is a new one."""
        if lora is None:
            return None
        known = self._loaded.get(lora.lora_name)
        if lora.lora_path and known != lora:
            served = {entry["name"]: entry["path"] for entry in self.store.adapters()}
            if known is not None or served.get(lora.lora_name) != lora.lora_path:
                self.store.load(lora.lora_name, lora.lora_path, replace=True)
        self._loaded[lora.lora_name] = lora
        return self.store.resolve(lora.lora_name, self.names)

    def _run(
        self,
        shown: Sequence[str | None],
        ids: Sequence[list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None,
    ) -> list[RequestOutput]:
        params = _spread(sampling_params or SamplingParams(), len(ids), "sampling_params")
        loras = _loras(lora_request, len(ids))
        entries = [self.adapter_for(lora) for lora in loras]
        streams: list[Stream] = []
        try:
            for prompt, param, entry in zip(ids, params, entries, strict=True):
                streams.append(self.stream([prompt], param, adapter=entry))
            for stream in streams:
                for _ in stream:
                    pass
                for choice in stream.choices:
                    if choice.error is not None:
                        raise RuntimeError(f"request {choice.request_id} failed: {choice.error}")
        finally:
            for stream in streams:
                stream.close()
        return [
            self._output(text, stream, lora)
            for text, stream, lora in zip(shown, streams, loras, strict=True)
        ]

    def _output(self, text: str | None, stream: Stream, lora: LoRARequest | None) -> RequestOutput:
        first = stream.choices[0]
        scores = first.prompt_logprobs
        return RequestOutput(
            request_id=first.request_id,
            prompt=text,
            prompt_token_ids=first.prompt_ids,
            prompt_logprobs=[_logprobs(x, first.tokenizer) if x else None for x in scores]
            if scores
            else None,
            outputs=[self._completion(choice, lora) for choice in stream.choices],
            finished=True,
            lora_request=lora,
            num_cached_tokens=stream.cached_tokens,
        )

    def _completion(self, choice: Choice, lora: LoRARequest | None) -> CompletionOutput:
        wanted = choice.params.logprobs is not None
        return CompletionOutput(
            index=choice.index,
            text=choice.text,
            token_ids=choice.token_ids,
            cumulative_logprob=sum(x.logprob for x in choice.logprobs) if wanted else None,
            logprobs=[_logprobs(x, choice.tokenizer) for x in choice.logprobs] if wanted else None,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            lora_request=lora,
        )


def _logprobs(scored: TokenLogprobs, tokenizer: Tokenizer) -> dict[int, Logprob]:
    """vLLM's shape: the sampled token first, then the top ones; ranks count from 1."""
    ranks = {token: i for i, token in enumerate(scored.top, start=1)}
    values = {scored.token: scored.logprob} | dict(scored.top)
    return {
        token: Logprob(
            logprob=value,
            rank=scored.rank if token == scored.token else ranks[token],
            decoded_token=tokenizer.token_text(token),
        )
        for token, value in values.items()
    }


def _by_field(options: dict[str, Any]) -> dict[str, Any]:
    """Options by the fields of ModelOptions, whose flags have other names too."""
    names = {field.name: field.name for field in dataclasses.fields(ModelOptions)}
    for field in dataclasses.fields(ModelOptions):
        for flag in field.metadata.get("aliases", ()):
            names[flag.removeprefix("--").replace("-", "_")] = field.name
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name == "enable_lora" and value is True:  # it always is
            continue
        if name not in names:
            hint = ModelOptions.ABSENT.get(name) or near(name, names)
            hint = hint or f"known: {', '.join(sorted(set(names.values())))}"
            raise ParameterError(f"LLM has no option {name!r}: {hint}", name)
        if names[name] in found:
            raise ParameterError(f"LLM got {names[name]} twice, once as {name}", name)
        found[names[name]] = value
    return found


def template_of(entry: AdapterEntry | None) -> str | None:
    """The chat template that an adapter's folder brings, if any."""
    return getattr(entry, "chat_template", None)


def _as_prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, dict):
        known = {"prompt", "prompt_token_ids"}
        if set(prompt) - known or len(prompt) != 1:
            raise ParameterError(
                "a prompt dict has one key, 'prompt' or 'prompt_token_ids'", "prompts"
            )
        (prompt,) = prompt.values()
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence) and all(isinstance(token, int) for token in prompt):
        return list(prompt)
    raise ParameterError("a prompt must be text or a list of token ids", "prompts")


def _loras(value: Any, count: int) -> list[LoRARequest | None]:
    """A LoRARequest or None for each prompt; a name means one adapter within a call."""
    loras = _spread(value, count, "lora_request")
    for lora in loras:
        if not isinstance(lora, LoRARequest | None):
            raise ParameterError(
                f"lora_request must be LoRARequest(name, id, path) or None, got {lora!r}",
                "lora_request",
            )
    named: dict[str, LoRARequest] = {}
    for lora in loras:
        if lora is not None and (other := named.setdefault(lora.lora_name, lora)) != lora:
            raise ParameterError(
                f"lora_request: one call has two adapters named {lora.lora_name!r}, {other} and "
                f"{lora}; give each a name of its own",
                "lora_request",
            )
    return loras


def _spread(value: Any, count: int, name: str) -> list[Any]:
    """One value for all prompts, or one value each."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise ParameterError(f"{name} has {len(value)} items for {count} prompts", name)
    return list(value)
