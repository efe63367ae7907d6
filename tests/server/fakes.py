"""A deterministic engine without jax, and adapters that are one line of text, for the server's tests.

The "model" writes a fixed text, token by token: the adapter's own, or `BASE_TEXT`; then it ends. The
store is the real one. `FakeEngine.hold` stops time.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from jlora.adapters.store import AdapterEntry, AdapterStore
from jlora.engine.config import EngineConfig, check_tokens
from jlora.engine.params import SamplingParams
from jlora.engine.sequence import Event, TokenLogprobs
from jlora.errors import AdapterError, AdapterNotFound
from jlora.llm import LLM
from jlora.parts import Parts
from jlora.tokenizer import Tokenizer

BASE_TEXT = "the base model speaks: naïve café 🙂 日本 and on it goes until it stops"
EOS = 2


@dataclass(frozen=True)
class FakeStaged:
    uid: str
    chat_template: str | None = None
    base_model: str | None = "tiny"
    rank: int = 8
    modules: tuple[str, ...] = ("q_proj", "v_proj")
    nbytes: int = 1000
    pages: int = 1
    bound: int = 4
    scalings: tuple[float, ...] = (2.0,)
    added_tokens: int = 0
    tokenizer: Any | None = None
    eos_ids: tuple[int, ...] = ()


def fake_read(path: str) -> FakeStaged:
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterNotFound(f"No adapter found for {path}")
    file = folder / "text.txt"
    if not file.is_file():
        raise AdapterError(f"{path}: text.txt is missing")
    text = file.read_text(encoding="utf-8")
    if text.startswith("BROKEN"):
        raise AdapterError(f"{path}: adapter_config.json is not JSON")
    template = folder / "chat_template.jinja"
    return FakeStaged(uid=text, chat_template=template.read_text() if template.exists() else None)


def write_adapter(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return folder


def scored(token: int, count: int) -> TokenLogprobs:
    """The token is always the likeliest; its neighbours follow, each a bit less likely."""
    sign = 1 if token < 100 else -1
    top = {token + sign * i: -0.25 * (i + 1) for i in range(count)}
    return TokenLogprobs(token=token, logprob=-0.25, rank=1, top=top)


@dataclass(eq=False)
class Running:
    request_id: str
    prompt: list[int]
    params: SamplingParams
    adapter: AdapterEntry | None
    on_event: Callable[[Event], None]
    script: list[int]
    at: int = 0


@dataclass(eq=False)
class FakeEngine:
    store: AdapterStore
    tokenizer: Tokenizer
    max_model_len: int = 256
    pace: float = 0.0005
    ready: bool = True
    failure: str | None = None
    merged: Any | None = None
    settled: bool = True
    requests: list[Running] = field(default_factory=list)
    """Every request that was ever submitted."""

    def __post_init__(self) -> None:
        self.active: dict[str, Running] = {}
        self.aborted: list[str] = []
        self.time = threading.Event()
        self.time.set()
        self._lock = threading.Lock()
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def hold(self) -> None:
        self.time.clear()

    def go_on(self) -> None:
        self.time.set()

    def check(
        self, prompt: Sequence[int], params: SamplingParams, adapter: Any | None = None
    ) -> None:
        EngineConfig(max_model_len=self.max_model_len).check_request(len(prompt), params)
        check_tokens(self.tokenizer.vocab_size, prompt, params)

    def submit(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        adapter: AdapterEntry | None,
        on_event: Callable[[Event], None],
        bell: Callable[[], None] | None = None,
    ) -> None:
        def tell(event: Event) -> None:
            on_event(event)
            if bell is not None:
                bell()

        if adapter is not None:
            self.store.acquire(adapter)
        text = BASE_TEXT if adapter is None else adapter.uid
        script = [*self.tokenizer.encode(text), EOS]
        if params.ignore_eos:
            script = script[:-1] * 40
        request = Running(request_id, prompt, params, adapter, tell, script)
        with self._lock:
            self.requests.append(request)
            self.active[request_id] = request

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._end(request_id, "abort")

    def _end(self, request_id: str, reason: str) -> None:
        with self._lock:
            request = self.active.pop(request_id, None)
        if request is not None:
            self._release(request)
            request.on_event(Event(request_id=request_id, finish_reason=reason))  # type: ignore[arg-type]

    def _release(self, request: Running) -> None:
        if request.adapter is not None:
            self.store.release(request.adapter)

    def _run(self) -> None:
        while not self._stop:
            time.sleep(self.pace)
            self.time.wait()
            for request in list(self.active.values()):
                self._step(request)

    def _step(self, request: Running) -> None:
        params, first = request.params, request.at == 0
        prompt = None
        if first and params.prompt_logprobs is not None:
            wanted = params.prompt_logprobs
            prompt = [None, *(scored(token, wanted) for token in request.prompt[1:])]
        if request.adapter is not None and request.adapter.error:
            error = request.adapter.error
            self._last(
                request, Event(request_id=request.request_id, finish_reason="error", error=error)
            )
            return
        if params.max_tokens == 0:
            end = Event(
                request_id=request.request_id, prompt_logprobs=prompt, finish_reason="length"
            )
            self._last(request, end)
            return
        token = request.script[request.at]
        request.at += 1
        reason, stop = None, None
        if token == EOS and not params.ignore_eos:
            reason = "stop"
        elif token in params.stop_token_ids:
            reason, stop = "stop", token
        elif request.at >= (params.max_tokens or 1 << 30) or request.at == len(request.script):
            reason = "length"
        event = Event(
            request_id=request.request_id,
            token_ids=(token,),
            logprobs=None if params.logprobs is None else [scored(token, params.logprobs)],
            prompt_logprobs=prompt,
            finish_reason=reason,
            stop_reason=stop,
        )
        if reason is None:
            request.on_event(event)
        else:
            self._last(request, event)

    def _last(self, request: Running, event: Event) -> None:
        with self._lock:
            if self.active.pop(request.request_id, None) is None:
                return
        self._release(request)
        request.on_event(event)

    def fail(self, why: str) -> None:
        """What the real engine does when a step fails."""
        self.ready, self.failure = False, why
        for request in list(self.active.values()):
            self._last(
                request, Event(request_id=request.request_id, finish_reason="error", error=why)
            )

    def stats(self) -> SimpleNamespace:
        adapters = {r.adapter.name for r in self.active.values() if r.adapter is not None}
        return SimpleNamespace(
            running=len(self.active),
            waiting=0,
            kv_usage=0.25,
            prefix_queries=10,
            prefix_hits=4,
            preemptions=1,
            running_adapters=tuple(sorted(adapters)),
            waiting_adapters=(),
            max_loras=4,
        )

    def shutdown(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self.active and time.monotonic() < deadline:
            time.sleep(0.005)
        for request_id in list(self.active):
            self._end(request_id, "abort")
        self._stop, self.ready = True, False


def fake_llm(tokenizer: Tokenizer, **store_options: Any) -> LLM:
    """A model named `tiny` that stands on the fake engine."""
    store: AdapterStore = AdapterStore(
        read=cast(Any, fake_read),
        stage=cast(Any, lambda adapter: adapter),
        num_pages=16,
        reserved=("tiny", "tiny-alias"),
        **store_options,
    )
    engine = FakeEngine(store, tokenizer)
    return LLM.from_parts(
        Parts(
            engine=engine,
            store=store,
            tokenizer=tokenizer,
            names=("tiny", "tiny-alias"),
            path="/models/tiny",
            vocab=tokenizer.vocab_size,
        )
    )
