"""One adapter merged into the weights: it answers as PEFT does, nothing else is served meanwhile,
and the base comes back bit for bit."""

import shutil
import threading
import time
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlora.engine.engine import Engine
from jlora.engine.params import SamplingParams
from jlora.errors import AdapterError, ConflictError
from tests.engine.test_engine import NEW, PROMPTS, SMALL, Adapters, Job
from tests.models.test_decoder_kinds import make_adapter

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("few_shapes")


@pytest.fixture(scope="module", params=[1, 2])
def parts(request, tiny_model, tiny_adapter, tmp_path_factory):
    from jlora.build import build_engine
    from jlora.options import ModelOptions

    adapters = Adapters(tiny_model, tiny_adapter, "llama_odd")
    root = tmp_path_factory.mktemp("kinds")
    for kind in ("dora_embedding_head", "lora_bias", "norms"):
        adapters.paths[kind] = make_adapter(adapters.folder, root / kind, kind)
    modules = tuple(f"{name}={path}" for name, path in adapters.paths.items())
    options = ModelOptions(
        model=str(adapters.folder), lora_modules=modules, mesh=request.param, **SMALL
    )
    parts = build_engine(options)
    yield parts, adapters
    parts.engine.shutdown(0)


def weights(parts: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in parts.in_place._programs.weights]


def entry(parts: Any, name: str) -> Any:
    return parts.store.resolve(name, parts.names)


@pytest.mark.parametrize("name", ["r24", "dora_embedding_head", "norms"])
def test_a_merged_adapter_answers_as_peft_does_and_the_base_comes_back_bit_for_bit(parts, name):
    parts, adapters = parts
    prompt = PROMPTS[5]
    before, base = weights(parts), Job(parts, prompt).tokens
    assert base == adapters.greedy(None, prompt)
    parts.in_place.merge(entry(parts, name))
    try:
        assert weights(parts) != before
        for text in (prompt, PROMPTS[0], prompt):
            want = adapters.greedy(name, text)
            assert Job(parts, text, name).tokens == want
        assert adapters.greedy(name, prompt) != base, "an adapter without effect proves nothing"
        for other in (None, "r4"):
            with pytest.raises(ConflictError, match=f"'{name}' is merged"):
                Job(parts, prompt, other)
        with pytest.raises(ConflictError, match="unmerge it first"):
            parts.in_place.merge(entry(parts, "r4"))
        with pytest.raises(ConflictError, match="'r4' is not merged"):
            parts.in_place.unmerge(entry(parts, "r4"))
        path = adapters.paths[name]  # the same name again, as another entry
        again = parts.store.load(name, str(path), replace=True)
        assert again is not parts.engine.merged
    finally:
        parts.in_place.unmerge(entry(parts, name))
    assert weights(parts) == before
    assert Job(parts, prompt).tokens == base
    assert Job(parts, prompt, name).tokens == adapters.greedy(name, prompt)
    parts.store.check()


def test_what_the_base_has_no_place_for_is_refused_and_nothing_changes(parts):
    parts, adapters = parts
    before = weights(parts)
    with pytest.raises(AdapterError, match=r"the base has no layers\.0\.\w+\.bias"):
        parts.in_place.merge(entry(parts, "lora_bias"))
    assert weights(parts) == before
    assert Job(parts, PROMPTS[0]).tokens == adapters.greedy(None, PROMPTS[0])


def test_a_merge_that_fails_half_way_leaves_the_base_to_those_who_waited(
    tiny_model, tiny_adapter, tmp_path
):
    """In float16 the last layer's merged values overflow when the others are merged already."""
    from jlora.build import build_engine
    from jlora.options import ModelOptions

    adapters = Adapters(tiny_model, tiny_adapter)
    folder = shutil.copytree(adapters.paths["r8"], tmp_path / "large")
    tensors = load_file(folder / "adapter_model.safetensors")
    last = max(name for name in tensors if "down_proj.lora_B" in name)
    for name in (last, last.replace("lora_B", "lora_A")):
        tensors[name] = np.full_like(tensors[name], 300)
    save_file(tensors, folder / "adapter_model.safetensors")
    options = {"lora_modules": (f"large={folder}",), "dtype": "float16", **SMALL}
    parts = build_engine(ModelOptions(model=str(adapters.folder), **options))
    in_place, engine = parts.in_place, parts.engine
    assert in_place is not None
    assert isinstance(engine, Engine)
    try:
        before, base = weights(parts), Job(parts, PROMPTS[0]).tokens
        running, errors = Job(parts, PROMPTS[1], max_tokens=100), []

        def merge() -> None:
            try:
                in_place.merge(entry(parts, "large"))
            except AdapterError as error:
                errors.append(str(error))

        thread = threading.Thread(target=merge)
        thread.start()
        end = time.monotonic() + 60
        while not engine._exclusive and time.monotonic() < end:
            time.sleep(0.001)  # those who come now wait for the merge's end
        waiting = [Job(parts, PROMPTS[0]) for _ in range(3)]
        thread.join(60)
        (error,) = errors
        assert "do not fit float16" in error
        assert [job.tokens for job in waiting] == [base] * 3
        assert len(running.tokens) == 100
        assert weights(parts) == before
    finally:
        parts.engine.shutdown(0)


def test_running_requests_end_before_a_merge_and_waiting_ones_go_on_after_it(parts):
    parts, adapters = parts
    running = [Job(parts, PROMPTS[0], other, max_tokens=60) for other in (None, "r4")]
    thread = threading.Thread(target=parts.in_place.merge, args=(entry(parts, "r8"),))
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    for job, name in zip(running, (None, "r4"), strict=True):
        assert job.tokens[:NEW] == adapters.greedy(name, PROMPTS[0])
        assert len(job.tokens) == 60
    try:
        assert Job(parts, PROMPTS[0], "r8").tokens == adapters.greedy("r8", PROMPTS[0])
    finally:
        parts.in_place.unmerge(entry(parts, "r8"))


def test_who_reads_the_last_request_does_not_wait_for_the_merge_after_it(parts):
    parts, _ = parts
    events, read = [], threading.Event()

    def bell() -> None:
        if events[-1].finish_reason is not None:
            read.set()

    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    parts.engine.submit("last", PROMPTS[0], params, None, events.append, bell)
    told = []
    parts.engine.exclusive(lambda: told.append(read.wait(10)))
    assert told == [True]
    assert sum(len(event.token_ids) for event in events) == NEW


def test_a_bell_that_fails_is_logged_and_touches_nobody_else(parts, caplog):
    parts, adapters = parts

    def bell() -> None:
        raise ZeroDivisionError("the reader is gone")

    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    parts.engine.submit("gone", PROMPTS[1], params, None, print, bell)
    assert Job(parts, PROMPTS[0]).tokens == adapters.greedy(None, PROMPTS[0])
    assert "the reader is gone" in caplog.text


def test_an_engine_can_start_with_an_adapter_merged(tiny_model, tiny_adapter):
    from jlora.build import build_engine
    from jlora.options import ModelOptions

    adapters = Adapters(tiny_model, tiny_adapter)
    options = ModelOptions(
        model=str(adapters.folder),
        lora_modules=(f"r8={adapters.paths['r8']}",),
        merge="r8",
        **SMALL,
    )
    parts = build_engine(options)
    try:
        assert Job(parts, PROMPTS[0], "r8").tokens == adapters.greedy("r8", PROMPTS[0])
        with pytest.raises(ConflictError):
            Job(parts, PROMPTS[0])
        assert parts.in_place is not None
        parts.in_place.unmerge(entry(parts, "r8"))
        assert Job(parts, PROMPTS[0]).tokens == adapters.greedy(None, PROMPTS[0])
    finally:
        parts.engine.shutdown(0)
