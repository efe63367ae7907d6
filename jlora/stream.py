"""The text side of running requests: detokenising, stop strings, and the way from the engine's
thread to whoever reads.

The engine's thread only appends an event and wakes the reader; all text work happens in the reader.
"""

import asyncio
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from jlora.engine.params import SamplingParams
from jlora.engine.sequence import Event, TokenLogprobs
from jlora.tokenizer import Detokenizer, Tokenizer


class Delta(NamedTuple):
    """What the engine's events since the last one add to one choice."""

    index: int
    """Number of the choice in its request: prompt number * n + sample number."""
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    """One entry per token of `token_ids`, when the request wants logprobs."""
    finish_reason: str | None = None
    """None, or "stop", "length", "abort", "error"."""
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it; None for end-of-sequence."""
    error: str | None = None
    first_at: float | None = None
    """When the choice's first token left the engine, in `time.monotonic` seconds, if it is here."""
    gaps: tuple[float, ...] = ()
    """Seconds before the tokens of each event, but for the first."""

    def followed_by(self, other: "Delta") -> "Delta":
        """Both in one."""
        return Delta(
            index=self.index,
            text=self.text + other.text,
            token_ids=self.token_ids + other.token_ids,
            logprobs=other.logprobs
            if self.logprobs is None
            else self.logprobs + (other.logprobs or []),
            finish_reason=other.finish_reason,
            stop_reason=other.stop_reason,
            error=other.error,
            first_at=self.first_at,
            gaps=self.gaps + other.gaps,
        )


class Cut(NamedTuple):
    """Text that may be shown, and the stop string that was found at its end, if any."""

    text: str
    stop: str | None = None


class StopStrings:
    """Finds stop strings in text that comes in pieces; keeps back a tail that may become one."""

    def __init__(self, stops: Sequence[str], *, include: bool = False):
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, text: str, *, check: bool = True) -> Cut:
        """`check=False` lets text through (min_tokens is not reached yet)."""
        text = self._held + text
        self._held = ""
        if not (check and self._stops):
            return Cut(text=text)
        # The stop that ends first is the one a character-by-character reader would have met.
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            end, at, stop = min(hits, key=lambda hit: (hit[0], hit[1]))
            return Cut(text=text[:end] if self._include else text[:at], stop=stop)
        keep = max(self._overlap(text, stop) for stop in self._stops)
        if keep:
            text, self._held = text[:-keep], text[-keep:]
        return Cut(text=text)

    def flush(self) -> str:
        """What was kept back, once nothing more can come."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that `stop` starts with."""
        for size in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:size]):
                return size
        return 0


@dataclass(kw_only=True)
class Choice:
    """One generation of a request: the pure state machine from events to deltas."""

    index: int
    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    tokenizer: Tokenizer
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    first_at: float | None = None
    last_at: float | None = None
    queue_seconds: float | None = None
    """Time until its first step, if the engine tells."""

    def __post_init__(self) -> None:
        self._detokenizer = Detokenizer(
            self.tokenizer, skip_special_tokens=self.params.skip_special_tokens
        )
        self._stops = StopStrings(self.params.stop, include=self.params.include_stop_str_in_output)

    def feed(self, event: Event, at: float) -> Delta | None:
        """The next delta, or None when the choice has ended already (its text hit a stop string)."""
        if self.finish_reason is not None:
            return None
        self.cached_tokens = max(self.cached_tokens, event.num_cached_tokens or 0)
        if self.queue_seconds is None:
            self.queue_seconds = event.queue_seconds
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = list(event.prompt_logprobs)
        text, count, stop = "", 0, None
        # The token that ended the generation is not part of its text, as in vLLM.
        hidden = event.finish_reason == "stop" and not self.params.include_stop_str_in_output
        shown = len(event.token_ids) - hidden
        for count, token in enumerate(event.token_ids, start=1):
            self.token_ids.append(token)
            piece = self._detokenizer.push((token,)) if count <= shown else ""
            if piece and self.params.stop:
                check = len(self.token_ids) > self.params.min_tokens
                piece, stop = self._stops.push(piece, check=check)
            text += piece
            if stop is not None:
                break
        if stop is not None:
            self.finish_reason, self.stop_reason = "stop", stop
        elif event.finish_reason is not None:
            cut = self._stops.push(self._detokenizer.push((), final=True))
            text += cut.text + ("" if cut.stop else self._stops.flush())
            self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason
            if cut.stop is not None:
                self.finish_reason, self.stop_reason = "stop", cut.stop
            self.error = event.error
        logprobs = None
        if event.logprobs is not None:
            logprobs = list(event.logprobs[:count])
            self.logprobs.extend(logprobs)
        self.text += text
        first_at, gaps = None, ()
        if event.token_ids:
            if self.last_at is None:
                self.first_at = first_at = at
            else:
                gaps = (at - self.last_at,)
            self.last_at = at
        return Delta(
            index=self.index,
            text=text,
            token_ids=list(event.token_ids[:count]),
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=self.error,
            first_at=first_at,
            gaps=gaps,
        )


class Waker(Protocol):
    """How the engine's thread tells readers that streams have events."""

    def note(self, stream: "Stream") -> None:
        """This stream has an event."""
        ...

    def ring(self) -> None:
        """Wakes the readers of the streams that were noted."""
        ...


class ThreadWaker:
    """Wakes a reader that blocks in a thread."""

    def __init__(self) -> None:
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()

    def note(self, stream: "Stream") -> None:
        pass

    def ring(self) -> None:
        self._bell.put(None)

    def wait(self) -> None:
        self._bell.get()


class LoopWaker:
    """Wakes readers on an event loop: one call into the loop for all streams of an engine step."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._noted: deque[Stream] = deque()
        self._queued = False

    def note(self, stream: "Stream") -> None:
        self._noted.append(stream)

    def ring(self) -> None:
        if self._noted and not self._queued:
            self._queued = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop has closed: nobody reads any more
                self._queued = False

    def _deliver(self) -> None:
        # Cleared first: an event that comes from now on asks for another delivery.
        self._queued = False
        while self._noted:
            self._noted.popleft().wake()


class Stream:
    """All choices of one request. The engine's thread feeds it; one reader iterates.

    Iterate with `for delta in stream` or `while deltas := await stream.next()`, and call `close()` at
    the end whatever happened: it aborts what still runs.
    """

    def __init__(
        self,
        choices: list[Choice],
        *,
        submit: Callable[[Choice, Callable[[Event], None], Callable[[], None]], None],
        abort: Callable[[str], object],
        waker: Waker | None = None,
        adapter: Any = None,
    ):
        self.choices = choices
        self.adapter = adapter
        self.created = time.monotonic()
        self._submit = submit
        self._abort = abort
        self._waker: Waker = waker or ThreadWaker()
        self._events: deque[tuple[Choice, Event, float]] = deque()
        self._running = len(choices)
        self._eager = True
        self._waiter: asyncio.Future[None] | None = None

    def start(self) -> "Stream":
        """Hand every choice to the engine; when one is refused, none runs."""
        try:
            for choice in self.choices:
                self._submit(choice, self._receiver(choice), self._waker.ring)
        except BaseException:
            self.close()
            raise
        return self

    def _receiver(self, choice: Choice) -> Callable[[Event], None]:
        def receive(event: Event) -> None:  # runs on the engine's thread
            self._events.append((choice, event, time.monotonic()))
            if self._eager or event.finish_reason is not None:
                self._waker.note(self)

        return receive

    @property
    def finished(self) -> bool:
        return self._running == 0

    def _take(self) -> list[Delta]:
        """One delta for each choice that has events: a reader who is late reads less often."""
        deltas: dict[int, Delta] = {}
        while self._events:
            choice, event, at = self._events.popleft()
            delta = choice.feed(event, at)
            if delta is None:
                continue
            before = deltas.get(delta.index)
            deltas[delta.index] = delta if before is None else before.followed_by(delta)
            if delta.finish_reason is not None:
                self._running -= 1
                if event.finish_reason is None:  # a stop string: the engine does not know it
                    self._abort(choice.request_id)
        return list(deltas.values())

    def __iter__(self) -> Iterator[Delta]:
        assert isinstance(self._waker, ThreadWaker), "this stream belongs to an event loop"
        while not self.finished:
            self._waker.wait()
            yield from self._take()

    async def next(self) -> list[Delta]:
        """One delta for each choice that something came for since the last call; [] at the end."""
        while not self.finished:
            if not self._events:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            if deltas := self._take():
                return deltas
        return []

    def wake(self) -> None:
        """Lets `next` go on; on its loop."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def read_at_the_end(self) -> None:
        """Nobody wants to see it grow: the reader is woken once, if no text has to be looked through
        for stop strings."""
        self._eager = any(choice.params.stop for choice in self.choices)

    def cut(self) -> None:
        """End it now; the reader gets a last delta with reason "abort" for every choice."""
        for choice in self.choices:
            if choice.finish_reason is None:
                self._abort(choice.request_id)
                self._receiver(choice)(Event(request_id=choice.request_id, finish_reason="abort"))
        self._waker.ring()

    def close(self) -> None:
        """Abort every choice that still runs. May be called from any thread, more than once."""
        for choice in self.choices:
            if choice.finish_reason is None:
                choice.finish_reason = "abort"
                self._abort(choice.request_id)
        self._running = 0

    @property
    def prompt_count(self) -> int:
        """Prompts of the request; samples of one prompt share its list of ids."""
        return len({id(choice.prompt_ids) for choice in self.choices})

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        prompts = {id(choice.prompt_ids): choice for choice in self.choices}
        return sum(len(choice.prompt_ids) for choice in prompts.values())

    @property
    def completion_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices)

    @property
    def cached_tokens(self) -> int:
        prompts = {id(choice.prompt_ids): choice for choice in reversed(self.choices)}
        return sum(choice.cached_tokens for choice in prompts.values())
