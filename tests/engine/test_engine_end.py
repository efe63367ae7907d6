"""The end of an engine: whatever stops it, every request gets a last event and holds nothing.

A device without jax stands in for the runner, so that a step can be held up and made to fail.
"""

import threading
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jlora.engine.config import EngineConfig, buckets
from jlora.engine.engine import Engine
from jlora.engine.params import SamplingParams
from jlora.engine.runner import Result
from jlora.engine.sequence import Event
from jlora.errors import ParameterError
from jlora.shape import Shape
from tests.adapters.fakes import Disk, Fake, staged

CONFIG = EngineConfig(max_model_len=64, max_num_seqs=2)


class Device:
    """Samples token 5 for ever; `hold` stops it within a step, `broken` makes the step fail."""

    in_order, compiled_shapes = False, 1

    def __init__(self) -> None:
        self.go, self.inside = threading.Event(), threading.Event()
        self.go.set()
        self.broken = False

    def dispatch(self, plan: Any, shape: Any, rank_pages: Any) -> Any:
        return [chunk.seq.request_id for chunk in (*plan.decodes, *plan.prefills) if chunk.samples]

    def first_run(self) -> bool:
        return False

    def collect(self, pending: Any) -> Result:
        self.inside.set()
        assert self.go.wait(10)
        if self.broken:
            raise RuntimeError("the device fell over")
        return Result(tokens=dict.fromkeys(pending, 5))


class Job:
    """One request, and its events as they come."""

    def __init__(self, engine: Engine, prompt: list[int], entry: Any, params: SamplingParams):
        self.events: list[Event] = []
        self._done = threading.Event()
        engine.submit(f"job{id(self)}", prompt, params, entry, self._take)

    def _take(self, event: Event) -> None:
        self.events.append(event)
        if event.finish_reason is not None:
            self._done.set()

    @property
    def tokens(self) -> list[int]:
        assert self._done.wait(60), "the request did not end"
        assert self.events[-1].error is None
        return [token for event in self.events for token in event.token_ids]


@pytest.fixture
def parts():
    from jlora.adapters.store import AdapterStore

    disk, device = Disk(), Device()
    disk.folders["a"] = Fake("a")
    store: Any = AdapterStore(read=disk.read, stage=staged, num_pages=4)  # type: ignore[arg-type]
    engine = Engine(
        device,  # type: ignore[arg-type]
        CONFIG,
        store,
        buckets(CONFIG),
        num_pages=64,
        eos_ids=(),
        vocab=100,
    )
    store.on_change = engine.wake
    engine.start()
    yield SimpleNamespace(engine=engine, device=device, store=store, entry=store.load("a", "a"))
    device.go.set()
    engine.shutdown()


def submit(parts: Any, request_id: str) -> list[Event]:
    events: list[Event] = []
    params = SamplingParams(max_tokens=50)
    parts.engine.submit(request_id, [1, 2, 3], params, parts.entry, events.append)
    return events


def hold_a_step(parts: Any) -> list[Event]:
    """The events of a request whose step is held up on the device."""
    parts.device.go.clear()
    first = submit(parts, "first")
    assert parts.device.inside.wait(10)
    return first


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], {}, "prompt"),
        ([1] * 64, {}, "prompt"),
        ([1, 100], {}, "prompt"),
        ([1, -1], {}, "prompt"),
        ([1], {"logit_bias": {100: 1.0}}, "logit_bias"),
        ([1], {"stop_token_ids": [100]}, "stop_token_ids"),
        ([1], {"logprobs": 21}, "logprobs"),
        ([1], {"prompt_logprobs": 21}, "prompt_logprobs"),
    ],
)
def test_a_request_that_can_never_run_is_refused_and_holds_nothing(parts, prompt, params, param):
    with pytest.raises(ParameterError) as caught:
        parts.engine.submit("r", prompt, SamplingParams(**params), parts.entry, lambda event: None)
    assert caught.value.param == param
    assert parts.entry.in_flight == 0


def test_requests_that_came_during_the_step_that_fails_end_with_an_error(parts):
    first = hold_a_step(parts)
    late = submit(parts, "late")
    parts.device.broken = True
    parts.device.go.set()
    parts.engine._thread.join(10)
    for events in (first, late):
        assert [event.finish_reason for event in events] == ["error"]
        assert "fell over" in (events[0].error or "")
    assert parts.entry.in_flight == 0
    assert not parts.engine.ready
    with pytest.raises(RuntimeError, match="stopped"):
        submit(parts, "later")
    assert parts.entry.in_flight == 0


def test_requests_that_came_during_the_last_step_of_a_shutdown_are_aborted(parts):
    first = hold_a_step(parts)
    late = submit(parts, "late")
    parts.engine._stop.set()
    parts.device.go.set()
    parts.engine._thread.join(10)
    for events in (first, late):
        assert events[-1].finish_reason == "abort"
    assert parts.entry.in_flight == 0


def test_a_shutdown_gives_time_to_a_request_that_no_step_has_seen(parts):
    hold_a_step(parts)
    late = submit(parts, "late")
    threading.Timer(0.1, parts.device.go.set).start()
    parts.engine.shutdown(timeout=30)
    assert late[-1].finish_reason == "length"
    assert parts.entry.in_flight == 0


def test_an_interrupt_while_compiling_does_not_compile_the_rest_first(monkeypatch):
    from jlora.engine.programs import Programs
    from jlora.engine.sampler import Kind, empty_slots
    from jlora.models.config import ModelConfig
    from jlora.models.weights import abstract_decoder
    from jlora.sharding import Layout, make_mesh, sharding
    from tests import tiny

    compiled: list[int] = []

    class Lowered:
        def compile(self) -> None:
            compiled.append(1)
            threading.Event().wait(0.02)

    class Lowering:
        def parts(self, shape: Shape, _: list) -> list:
            return [(f"part {n}", shape) for n in range(200)]

        def lower(self, *_: object) -> Lowered:
            return Lowered()

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    cfg = ModelConfig.from_dict(tiny.model_config("llama"))
    layout, mesh = Layout(cfg, 1), make_mesh(1)
    model = abstract_decoder(layout, np.dtype(np.float32), copy_head=True)
    programs = Programs(
        model, layout, mesh, 5, copy_pages=False, split=False, kinds=[Kind.ANY], folder=None
    )
    slots = jax.device_put(empty_slots(1, cfg.vocab_rows), sharding(mesh))
    monkeypatch.setattr(programs, "_lowering", Lowering())
    for name in ("_lower_sample", "_lower_score"):
        monkeypatch.setattr(programs, name, lambda *_: Lowered())
    shapes = buckets(CONFIG)
    with pytest.raises(KeyboardInterrupt):
        programs.compile_all(shapes, [], [], slots, interrupted)
    assert len(compiled) < 200 * len(shapes) // 2
