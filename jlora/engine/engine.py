"""The engine: one thread that owns jax, an inbox, and events that go out.

The loop plans step n+1 and queues it on the device before it reads step n's tokens, so the device
does not wait for the host. Invariant: every request that was submitted gets exactly one event with
a finish reason, whatever happens.
"""

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from jlora.engine.clients import Bell, Client, Clients, OnEvent
from jlora.engine.config import EngineConfig, check_tokens, pick
from jlora.engine.pages import KVPages
from jlora.engine.params import SamplingParams
from jlora.engine.runner import Pending, Runner
from jlora.engine.scheduler import Plan, Scheduler
from jlora.engine.sequence import Event, Sequence
from jlora.errors import ConflictError, JloraError
from jlora.shape import Shape

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A snapshot for metrics; all counts are since the start."""

    running: int
    waiting: int
    kv_usage: float
    """Share of K/V pages that sequences hold, 0 to 1."""
    prefix_queries: int
    """Prompt tokens that were looked up in the prefix cache."""
    prefix_hits: int
    """Prompt tokens that were found there."""
    preemptions: int
    steps: int
    running_adapters: tuple[str, ...]
    waiting_adapters: tuple[str, ...]
    max_loras: int


class Engine:
    """Runs requests until `shutdown`. Every public method may be called from any thread."""

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        store: Any,
        shapes: Seq[Shape],
        *,
        num_pages: int,
        eos_ids: tuple[int, ...],
        vocab: int,
    ):
        """`runner` must be warm: all of `shapes` compiled. The thread starts with `start`."""
        self.config = config
        self.runner = runner
        self.vocab = vocab
        self._shapes = tuple(shapes)
        self._eos_ids = eos_ids
        self._store = store
        self._pages = KVPages(num_pages, config.page_size, config.enable_prefix_caching)
        self._scheduler = Scheduler(config, self._pages, store)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._clients = Clients()
        self._seeds = itertools.count(config.seed)
        self.merged: Any | None = None
        """The adapter that the weights hold now; changed by `exclusive` work only."""
        self._exclusive: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._held: list[Client] = []  # came while exclusive work waits
        self._stop = threading.Event()
        self._refusing = False
        self._failed: str | None = None
        self._ended = False
        self._gate = threading.Lock()  # between a late `submit` and the thread's last look
        self._steps = 0
        self._stats = self._snapshot()
        self._thread = threading.Thread(target=self._run, name="jlora-engine", daemon=True)

    @property
    def max_model_len(self) -> int:
        """Tokens of a sequence at most, prompt and output together."""
        return self.config.max_model_len

    @property
    def compiled_shapes(self) -> int:
        """Step shapes compiled before ready."""
        return self.runner.compiled_shapes

    @property
    def settled(self) -> bool:
        """Whether no first runs of programs are left for idle moments."""
        return self.runner.settled

    @property
    def ready(self) -> bool:
        """Whether requests are being served."""
        return self._thread.is_alive() and self._failed is None

    @property
    def failure(self) -> str | None:
        """What stopped the engine, if something did; it never runs again."""
        return self._failed

    def start(self) -> None:
        """Starts the engine's thread, which owns jax from now on."""
        self._thread.start()

    def check(self, prompt: Seq[int], params: SamplingParams, adapter: Any | None = None) -> None:
        """Raises ParameterError for a request that can never run here; an adapter may have tokens of
        its own."""
        self.config.check_request(len(prompt), params)
        check_tokens(self.vocab + getattr(adapter, "added_tokens", 0), prompt, params)

    def submit(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        adapter: Any | None,
        on_event: OnEvent,
        bell: Bell | None = None,
    ) -> None:
        """Queues a request; its adapter is held from now until its last event.

        `on_event` is called on the engine's thread and must not block; neither must `bell`, which
        is called after the events of a step, once for all requests whose bells are equal: to wake
        a reader costs more than to tell it one event. Raises ParameterError for a request that can
        never run, UnknownModelError if the adapter was unloaded meanwhile, ConflictError if another
        one is merged into the weights.
        """
        self.check(prompt, params, adapter)
        self._check_merged(adapter)
        if self._failed is not None:
            raise RuntimeError(f"the engine has stopped: {self._failed}")
        if self._refusing:
            raise RuntimeError("the engine is shutting down")
        seed = params.seed if params.seed is not None else next(self._seeds)
        seq = Sequence(
            request_id=request_id,
            prompt=prompt,
            params=params,
            adapter=adapter,
            eos_ids=(*self._eos_ids, *getattr(adapter, "eos_ids", ())),
            arrival=time.monotonic(),
            seed=seed,
        )
        if adapter is not None:
            self._store.acquire(adapter)
        with self._gate:
            if not self._ended:
                self._inbox.put(lambda: self._add(Client(seq, on_event, bell)))
                return
        if adapter is not None:
            self._store.release(adapter)
        raise RuntimeError("the engine has stopped")

    def _check_merged(self, adapter: Any | None) -> None:
        if self.merged is not None and adapter is not self.merged:
            what = "the base model" if adapter is None else f"adapter '{adapter.name}'"
            raise ConflictError(
                f"{what} cannot be served while adapter '{self.merged.name}' is merged into the weights; "
                f"POST /v1/adapters/{self.merged.name}/unmerge first"
            )

    def exclusive(self, work: Callable[[], None]) -> None:
        """Runs `work` on the engine's thread when no request is left; new ones wait until then.

        Raises what `work` raises. What it leaves is another model: cached prefixes are forgotten.
        """
        done: Future[None] = Future()
        if not self._thread.is_alive() and not self._ended:  # before `start`
            self._exclusive.append((work, done))
            self._run_exclusive()
        else:
            with self._gate:
                if self._ended:
                    raise RuntimeError("the engine has stopped")
                self._inbox.put(lambda: self._exclusive.append((work, done)))
        done.result()

    def abort(self, request_id: str) -> None:
        """Ends a request; its last event says "abort". Unknown ids are ignored."""

        def end() -> None:
            if self._ended:
                return
            for client in [c for c in self._held if c.seq.request_id == request_id]:
                self._held.remove(client)
                if client.seq.adapter is not None:
                    self._store.release(client.seq.adapter)
                self._clients.emit(client, Event(request_id=request_id, finish_reason="abort"))
            seq = self._scheduler.abort(request_id)
            if seq is not None:
                self._clients.close(seq)

        self._inbox.put(end)

    def wake(self) -> None:
        """Makes the engine look again: an adapter that requests wait for has arrived."""
        self._inbox.put(lambda: None)

    def stats(self) -> EngineStats:
        """The latest snapshot, taken after each step."""
        return self._stats

    def shutdown(self, timeout: float = 0.0) -> None:
        """Takes no new requests, lets running ones go on for `timeout` seconds, then aborts them."""
        if not self._thread.is_alive():
            return
        deadline = time.monotonic() + timeout
        self._refusing = True
        unread = self._inbox.empty
        while (self._clients or not unread()) and time.monotonic() < deadline and self.ready:
            time.sleep(0.02)
        self._stop.set()
        self.wake()
        self._thread.join(timeout=60)

    # ---- the engine's thread --------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop()
            reason = "abort"
        except Exception as error:
            log.exception("the engine stopped")
            self._failed = f"{type(error).__name__}: {error}"
            reason = "error"
        with self._gate:
            self._ended = True
        self._read_inbox(wait=False)  # what came during the last step still gets its last event
        for client in list(self._clients.values()):
            if client.seq.finish_reason is None:
                client.seq.finish_reason = reason  # type: ignore[assignment]
                client.seq.error = self._failed
            self._clients.close(client.seq)
        self._release_held()
        self._clients.ring()
        for _, done in self._exclusive:
            done.set_exception(RuntimeError(self._failed or "the engine has stopped"))
        self._scheduler.abandon()

    def _release_held(self) -> None:
        held, self._held = self._held, []
        for client in held:
            self._add(client)

    def _run_exclusive(self) -> None:
        while self._exclusive:
            work, done = self._exclusive.popleft()
            try:
                work()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)
            self._pages.drop(None)
        self._release_held()

    def _loop(self) -> None:
        pending: deque[tuple[Plan, Pending]] = deque()
        depth = 0 if self.runner.in_order else 1
        while not self._stop.is_set():
            idle = not pending and not self._scheduler.unfinished
            if idle and self._exclusive:
                self._clients.ring()
                self._run_exclusive()
                idle = not self._scheduler.unfinished
            while idle and self._inbox.empty() and not self._stop.is_set():
                self._clients.ring()
                if not self.runner.first_run():
                    break
            self._read_inbox(wait=idle)
            if idle and self._exclusive:
                continue
            for uid in self._store.take_forgotten():
                self._pages.drop(uid)
            plan = self._scheduler.schedule()
            for seq in self._scheduler.take_ended():
                self._clients.close(seq)
            if plan is not None:
                pending.append((plan, self._dispatch(plan)))
                self._end_changed(plan)
            # Not before the device has its next step: readers take the interpreter's lock.
            self._clients.ring()
            if pending and (plan is None or len(pending) > depth):
                self._commit(*pending.popleft())
                if not depth:  # the next dispatch waits for its step
                    self._clients.ring()
            elif plan is None and self._scheduler.unfinished:
                self._read_inbox(wait=True, timeout=0.01)  # an adapter is being read
            self._stats = self._snapshot()

    def _read_inbox(self, *, wait: bool, timeout: float | None = None) -> None:
        try:
            if wait:
                self._inbox.get(timeout=timeout)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            pass

    def _add(self, client: Client) -> None:
        seq = client.seq
        if self._exclusive and not self._ended:
            self._held.append(client)
            return
        try:
            if self._ended:
                raise JloraError(self._failed or "the engine is shutting down")
            self._check_merged(seq.adapter)
            if seq.adapter is not None and seq.adapter is self.merged:
                self._store.release(seq.adapter)  # the weights are it: a step of the base
                seq.adapter = None
            self._scheduler.add(seq)
        except JloraError as error:  # or a request id that is in use
            if seq.adapter is not None:
                self._store.release(seq.adapter)
            reason = "error" if self._failed or not self._ended else "abort"
            self._clients.emit(
                client, Event(request_id=seq.request_id, finish_reason=reason, error=str(error))
            )
            return
        self._clients[seq.request_id] = client

    def _dispatch(self, plan: Plan) -> Pending:
        rank_pages = [self._store.pages(adapter) for adapter in plan.adapters]
        shape = pick(
            self._shapes, len(plan.decodes), plan.prefill_tokens, sum(map(len, rank_pages))
        )
        self._steps += 1
        return self.runner.dispatch(plan, shape, rank_pages)

    def _end_changed(self, plan: Plan) -> None:
        """Ends requests that were preempted and would now go on with other weights: their adapter
        had left the host and the device, and its folder was overwritten meanwhile."""
        for seq in [chunk.seq for chunk in plan.prefills if chunk.seq.cache_uid is not None]:
            client = self._clients[seq.request_id]
            client.uid = client.uid or seq.cache_uid
            if client.uid != seq.cache_uid:
                self._scheduler.abort(seq.request_id)
                seq.finish_reason = "error"
                seq.error = (
                    f"the folder of adapter {seq.adapter.name} was overwritten while this request "
                    "waited to go on; send it again for an answer by the new weights"
                )
                self._clients.close(seq)

    def _commit(self, plan: Plan, pending: Pending) -> None:
        result = self.runner.collect(pending)
        for request_id, (position, entries) in result.prompt_logprobs.items():
            client = self._clients.get(request_id)
            if client is not None and not client.scored:  # a preempted prompt is scored again
                client.prompt_logprobs = [*client.prompt_logprobs[:position], *entries]
        committed = self._scheduler.commit(plan, result.tokens)
        finished = {id(seq) for seq in committed.finished}
        for seq in committed.accepted:
            self._clients.send_token(seq, result, last=id(seq) in finished)
        told = {id(seq) for seq in committed.accepted}
        for seq in committed.finished:
            if id(seq) not in told:  # a prompt that was only scored
                self._clients.close(seq)

    def _snapshot(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_usage=self._pages.usage,
            prefix_queries=self._pages.queries,
            prefix_hits=self._pages.hits,
            preemptions=scheduler.preemptions,
            steps=self._steps,
            running_adapters=tuple(entry.name for entry in scheduler.running_adapters),
            waiting_adapters=tuple(entry.name for entry in scheduler.waiting_adapters),
            max_loras=self.config.max_loras,
        )
