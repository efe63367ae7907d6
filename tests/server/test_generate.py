"""`python -m jlora.generate` on the fake engine: what it prints and how it ends."""

from pathlib import Path
from typing import Any

import pytest

from jlora import generate
from jlora.llm import LLM
from jlora.tokenizer import Tokenizer
from tests.server.fakes import BASE_TEXT, FakeEngine, fake_llm, write_adapter


@pytest.fixture
def llm(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LLM:
    made = fake_llm(tokenizer)
    made.store.load("shout", write_adapter(tmp_path / "shout", "SHOUT"))
    monkeypatch.setattr(generate, "prepare_devices", lambda mesh: None)
    monkeypatch.setattr(generate, "setup_logging", lambda level: None)
    monkeypatch.setattr(LLM, "load", lambda options, progress=None: made)
    return made


def test_the_answer_goes_to_stdout(llm: LLM, capsys: pytest.CaptureFixture[str]):
    assert generate.main(["hello"]) == 0
    assert capsys.readouterr().out == BASE_TEXT + "\n"


def test_a_failed_request_is_one_line_and_status_1(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    engine = llm.engine
    assert isinstance(engine, FakeEngine)
    engine.hold()
    submit = engine.submit

    def broken(request_id: str, prompt: list[int], params: Any, adapter: Any, *tell: Any) -> None:
        submit(request_id, prompt, params, adapter, *tell)
        adapter.error = "Loading lora shout failed: the folder is gone"
        engine.go_on()

    monkeypatch.setattr(engine, "submit", broken)
    assert generate.main(["hello", "--lora", "shout"]) == 1
    error = capsys.readouterr().err
    assert error == (
        "jlora.generate: error: the request failed: Loading lora shout failed: the folder is gone\n"
    )


def test_an_unknown_adapter_is_one_line_and_status_2(llm: LLM, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        generate.main(["hello", "--lora", "ghost"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
