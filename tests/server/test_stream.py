"""How events of the engine's thread reach readers: woken once a step, late ones read more at a time."""

import asyncio
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from jlora.engine.params import SamplingParams
from jlora.engine.sequence import Event
from jlora.server.metrics import GAPS, MODEL, Gaps
from jlora.stream import Choice, LoopWaker, Stream
from jlora.tokenizer import Tokenizer
from tests.server.conftest import tokenizer as tokenizer
from tests.server.conftest import tokenizer_folder as tokenizer_folder


class Sender:
    """An engine that says what the test tells it to, and rings when the test does."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.waker = LoopWaker(loop)
        self.receivers: dict[str, Callable[[Event], None]] = {}

    def submit(self, choice: Choice, receive: Callable[[Event], None], bell: Any) -> None:
        self.receivers[choice.request_id] = receive

    def stream(self, tokenizer: Tokenizer, *names: str, **params: Any) -> Stream:
        choices = [
            Choice(
                index=index,
                request_id=name,
                prompt_ids=[5],
                params=SamplingParams(**params),
                tokenizer=tokenizer,
            )
            for index, name in enumerate(names)
        ]
        return Stream(choices, submit=self.submit, abort=print, waker=self.waker).start()

    def send(self, name: str, *tokens: int, finish: Any = None) -> None:
        self.receivers[name](Event(request_id=name, token_ids=tokens, finish_reason=finish))


def test_a_late_reader_gets_one_delta_of_each_choice_with_all_that_came(tokenizer: Tokenizer):
    async def read() -> None:
        engine = Sender(asyncio.get_running_loop())
        stream = engine.stream(tokenizer, "a", "b")
        a, b = tokenizer.encode("hello"), tokenizer.encode("you")
        for token in a:
            engine.send("a", token)
        for token in b:
            engine.send("b", token)
        engine.send("b", finish="length")
        engine.waker.ring()
        first, second = await stream.next()
        assert (first.index, first.text, first.token_ids) == (0, "hello", a)
        assert first.first_at is not None
        assert len(first.gaps) == len(a) - 1
        assert (second.text, second.token_ids, second.finish_reason) == ("you", b, "length")
        engine.send("a", a[0], finish="stop")
        engine.waker.ring()
        (last,) = await stream.next()
        assert (last.first_at, len(last.gaps), last.finish_reason) == (None, 1, "stop")
        assert await stream.next() == []

    asyncio.run(read())


def test_all_streams_of_a_step_cost_the_loop_one_call(tokenizer: Tokenizer):
    async def read() -> None:
        loop = asyncio.get_running_loop()
        engine = Sender(loop)
        names = [f"r{i}" for i in range(20)]
        streams = [engine.stream(tokenizer, name) for name in names]
        readers = [asyncio.ensure_future(stream.next()) for stream in streams]
        await asyncio.sleep(0)
        calls = []
        threadsafe = loop.call_soon_threadsafe

        def call(*args: Any) -> Any:
            calls.append(args)
            return threadsafe(*args)

        loop.call_soon_threadsafe = call  # type: ignore[method-assign]
        for name in names:
            engine.send(name, 7)
        assert not calls, "nobody is woken before the step's last event"
        engine.waker.ring()
        engine.waker.ring()
        got = await asyncio.gather(*readers)
        loop.call_soon_threadsafe = threadsafe  # type: ignore[method-assign]
        assert len(calls) == 1
        assert [delta.token_ids for (delta,) in got] == [[7]] * 20

    asyncio.run(read())


def test_who_reads_at_the_end_is_woken_then_but_for_stop_strings(tokenizer: Tokenizer):
    async def read(**params: Any) -> int:
        engine = Sender(asyncio.get_running_loop())
        stream, wakes = engine.stream(tokenizer, "r", **params), 0
        stream.read_at_the_end()

        async def reader() -> None:
            nonlocal wakes
            while await stream.next():
                wakes += 1

        task = asyncio.ensure_future(reader())
        ids = tokenizer.encode("hello")
        for n, token in enumerate(ids):
            await asyncio.sleep(0)
            engine.send("r", token, finish="length" if n == len(ids) - 1 else None)
            engine.waker.ring()
            await asyncio.sleep(0.001)
        await asyncio.wait_for(task, 10)
        assert stream.choices[0].text == "hello"
        return wakes

    assert asyncio.run(read()) == 1
    assert asyncio.run(read(stop=("zzz",))) > 1


@given(st.lists(st.sampled_from(GAPS) | st.floats(0, 10)))
def test_time_between_tokens_is_shown_as_the_library_would(seconds: list[float]):
    ours, registry = Gaps("itl", "text", "model"), CollectorRegistry()
    library = Histogram("itl", "text", MODEL, buckets=GAPS, registry=registry).labels("model")
    for value in seconds:
        ours.observe(value)
        library.observe(value)
    want = [
        sample
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
    got = [sample for family in ours.collect() for sample in family.samples]
    assert [(s.name, s.labels, s.value) for s in got] == [(s.name, s.labels, s.value) for s in want]
