"""`LLM` in vLLM's Python shape, on the fake engine."""

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jlora.engine.params import SamplingParams
from jlora.errors import AdapterNotFound, ParameterError
from jlora.llm import LLM
from jlora.options import ModelOptions
from jlora.outputs import LoRARequest
from jlora.tokenizer import Tokenizer
from tests.server.fakes import BASE_TEXT, FakeEngine, fake_llm, write_adapter

LONG = SamplingParams(max_tokens=200)


@pytest.fixture
def llm(tokenizer: Tokenizer, tmp_path: Path) -> Iterator[LLM]:
    with fake_llm(tokenizer) as made:
        made.store.load("shout", write_adapter(tmp_path / "shout", "SHOUT"))
        yield made


def test_prompts_of_every_form_keep_their_order(llm: LLM):
    ids = llm.tokenizer.encode("c")
    prompts: list[Any] = ["a", {"prompt": "b"}, ids, {"prompt_token_ids": ids}]
    got = llm.generate(prompts, LONG)
    assert [one.prompt for one in got] == ["a", "b", None, None]
    assert [one.outputs[0].text for one in got] == [BASE_TEXT] * 4
    assert got[2].prompt_token_ids == ids
    assert all(one.finished and one.outputs[0].finish_reason == "stop" for one in got)
    assert len(llm.generate("alone")) == 1
    assert llm.generate(ids)[0].prompt_token_ids == ids
    assert llm.generate([]) == []


def test_get_tokenizer_is_transformers_own_of_the_checkpoint_or_of_the_adapter(
    llm: LLM, tokenizer_folder: Path, tmp_path: Path
):
    llm.parts = dataclasses.replace(llm.parts, path=str(tokenizer_folder))
    conversation = [{"role": "user", "content": "Hello there"}]
    theirs = llm.get_tokenizer()
    text = theirs.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert "Hello there" in text
    assert theirs.encode(text, add_special_tokens=False) == llm.tokenizer.encode(text)
    plain, own = (LoRARequest(name, 1, str(tmp_path / name)) for name in ("plain", "own"))
    (tmp_path / "plain").mkdir()
    shutil.copytree(tokenizer_folder, tmp_path / "own")
    assert llm.get_tokenizer(plain).name_or_path == str(tokenizer_folder)
    assert llm.get_tokenizer(own).name_or_path == str(tmp_path / "own")


def test_the_default_is_vllms_sixteen_tokens(llm: LLM):
    assert len(llm.generate("a")[0].outputs[0].token_ids) == 16


def test_a_lora_request_loads_its_path_once_and_a_new_id_reloads(llm: LLM, tmp_path: Path):
    folder = write_adapter(tmp_path / "cat", "Meow")
    first = LoRARequest("cat", 1, str(folder))
    assert llm.generate("a", LONG, lora_request=first)[0].outputs[0].text == "Meow"
    loads = llm.store.counters().loads
    llm.generate(["a", "b"], LONG, lora_request=first)
    assert llm.store.counters().loads == loads
    write_adapter(folder, "Purr")
    second = LoRARequest("cat", 2, str(folder))
    got = llm.generate(["a", "b"], LONG, lora_request=[second, None])
    assert [one.outputs[0].text for one in got] == ["Purr", BASE_TEXT]
    assert got[0].lora_request == second


@pytest.mark.parametrize(("number", "path"), [(1, "b"), (2, "b"), (2, "a")])
def test_one_name_for_two_adapters_in_one_call_is_an_error(
    llm: LLM, tmp_path: Path, number: int, path: str
):
    for name in ("a", "b"):
        write_adapter(tmp_path / name, f"I am {name}")
    loads = llm.store.counters().loads
    loras = [
        LoRARequest("twin", 1, str(tmp_path / "a")),
        None,
        LoRARequest("twin", number, str(tmp_path / path)),
    ]
    messages = [[{"role": "user", "content": "x"}]] * 3
    with pytest.raises(ParameterError, match="two adapters named 'twin'"):
        llm.generate(["x", "y", "z"], LONG, lora_request=loras)
    with pytest.raises(ParameterError, match="two adapters named 'twin'"):
        llm.chat(messages, LONG, lora_request=loras)
    assert llm.store.counters().loads == loads


def test_a_lora_request_without_a_path_names_what_is_loaded(llm: LLM):
    assert (
        llm.generate("a", LONG, lora_request=LoRARequest("shout", 1))[0].outputs[0].text == "SHOUT"
    )
    with pytest.raises(ParameterError):
        LoRARequest("x", 0)
    with pytest.raises(AdapterNotFound):
        llm.generate("a", lora_request=LoRARequest("ghost", 3, "/does/not/exist"))


def test_chat_goes_through_the_template(llm: LLM):
    messages = [{"role": "user", "content": "hello"}]
    one = llm.chat(messages, LONG)
    assert "hello" in (one[0].prompt or "")
    assert one[0].prompt != "hello"
    two = llm.chat([messages, messages], [LONG, LONG], lora_request=LoRARequest("shout", 1))
    assert [output.outputs[0].text for output in two] == ["SHOUT", "SHOUT"]


def test_logprobs_have_vllms_form(llm: LLM):
    params = SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=1)
    (got,) = llm.generate([[5, 6, 7]], params)
    output = got.outputs[0]
    assert output.logprobs is not None
    assert output.cumulative_logprob == pytest.approx(-0.75)
    first = output.logprobs[0][output.token_ids[0]]
    assert (first.logprob, first.rank) == (-0.25, 1)
    assert len(output.logprobs[0]) == 2
    assert got.prompt_logprobs is not None
    assert got.prompt_logprobs[0] is None
    assert got.prompt_logprobs[1] is not None
    assert set(got.prompt_logprobs[1]) == {6}


def test_n_samples_come_in_one_output(llm: LLM):
    (got,) = llm.generate("a", SamplingParams(n=3, max_tokens=4))
    assert [one.index for one in got.outputs] == [0, 1, 2]


def test_a_bad_prompt_in_a_batch_runs_none_of_it(llm: LLM):
    with pytest.raises(ParameterError):
        llm.generate(["fine", ""], SamplingParams(ignore_eos=True, max_tokens=200))
    assert isinstance(llm.engine, FakeEngine)
    assert not llm.engine.active


def test_what_a_request_may_be_is_the_engines_rule_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    def no(prompt: list[int], params: SamplingParams, adapter: object) -> None:
        raise ParameterError("not today", "prompt")

    llm.check([5], LONG)
    monkeypatch.setattr(llm.engine, "check", no)
    with pytest.raises(ParameterError, match="not today"):
        llm.check([5], LONG)
    monkeypatch.setattr(llm.engine, "check", lambda prompt, params, adapter: None)
    llm.check([10**9], LONG)


def test_closing_a_stream_aborts_what_runs(llm: LLM):
    assert isinstance(llm.engine, FakeEngine)
    stream = llm.stream([[5], [6]], SamplingParams(ignore_eos=True, max_tokens=200, n=2))
    assert next(iter(stream)).token_ids
    stream.close()
    assert not llm.engine.active
    assert sorted(llm.engine.aborted) == sorted(choice.request_id for choice in stream.choices)


def test_unknown_options_are_refused_before_anything_is_loaded():
    with pytest.raises(ParameterError, match="max_lora"):
        LLM("folder", max_lora=3)


@pytest.mark.parametrize("name", ["tensor_parallel_size", "tp_size", "mesh"])
def test_options_go_by_the_names_of_vllms_and_sglangs_flags_too(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    seen: list[ModelOptions] = []

    def build(options: ModelOptions, progress: object = None) -> object:
        seen.append(options)
        raise ParameterError("enough")

    given: dict[str, Any] = {"enable_lora": True, "max_loras_per_batch": 3, name: 2}
    given["lora_paths"] = {"a": "/a"}
    monkeypatch.setitem(sys.modules, "jlora.build", SimpleNamespace(build_engine=build))
    with pytest.raises(ParameterError, match="enough"):
        LLM("folder", **given)
    (options,) = seen
    assert (options.mesh, options.max_loras, options.lora_modules) == (2, 3, ("a=/a",))
    with pytest.raises(ParameterError, match="max_loras twice"):
        LLM("folder", max_loras=3, max_loras_per_batch=3)
    with pytest.raises(ParameterError, match="did you mean max_loras"):
        LLM("folder", max_lora=3)
    with pytest.raises(ParameterError, match="enable_lora"):
        LLM("folder", enable_lora=False)


def test_what_is_no_prompt_or_no_lora_request_is_named(llm: LLM):
    for prompts in (5, None, [None], [3.5], {"text": "x"}):
        with pytest.raises(ParameterError, match="prompt"):
            llm.generate(prompts)  # type: ignore[arg-type]
    for lora in ("shout", ["shout"], 1):
        with pytest.raises(ParameterError, match="LoRARequest"):
            llm.generate(["x"], lora_request=lora)  # type: ignore[arg-type]
        with pytest.raises(ParameterError, match="LoRARequest"):
            llm.chat([{"role": "user", "content": "x"}], lora_request=lora)  # type: ignore[arg-type]


def test_vllms_use_tqdm_changes_nothing(llm: LLM):
    messages = [{"role": "user", "content": "hello"}]
    for wanted in (True, False):
        assert llm.generate("a", LONG, use_tqdm=wanted)[0].outputs
        assert llm.chat(messages, LONG, use_tqdm=wanted)[0].outputs


def test_a_mesh_of_cpu_devices_needs_no_flag_in_the_environment():
    """In a process of its own: jax reads the flag once."""
    code = (
        "import sys\nfrom types import SimpleNamespace\nfrom jlora import LLM\n"
        "assert 'jax' not in sys.modules\n"
        "def build(options, progress=None):\n"
        "    import jax\n    print(jax.device_count())\n    sys.exit()\n"
        "sys.modules['jlora.build'] = SimpleNamespace(build_engine=build)\n"
        "LLM('folder', tensor_parallel_size=3)"
    )
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True
    )  # fmt: skip
    assert done.stdout == "3\n", done.stderr
