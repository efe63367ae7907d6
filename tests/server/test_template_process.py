"""An adapter's chat template can neither hang nor fill the server: it runs in a process with limits."""

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jlora import chat_template
from jlora.chat_template import TemplateProcess, render
from jlora.errors import ParameterError
from jlora.tokenizer import Tokenizer
from tests.server.conftest import Running
from tests.server.fakes import write_adapter

CONTEXT = {"messages": [{"role": "user", "content": "naïve 🙂"}], "bos_token": "<s>"}
PLAIN = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"

ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "one comparison in C": (
        "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(60) %}"
        "{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}"
    ),
}
HUGE = "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"


def test_the_text_is_the_same_as_in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "jinja2.py").write_text("raise SystemExit('the working directory is searched')")
    monkeypatch.chdir(tmp_path)
    assert (
        TemplateProcess().render(PLAIN, CONTEXT) == render(PLAIN, CONTEXT) == "<s>[user] naïve 🙂"
    )


def test_an_error_is_the_templates_own_words_and_the_process_goes_on():
    process = TemplateProcess()
    for template in ("{{ raise_exception('no system') }}", "{% for", "{{ ''.__class__.__mro__ }}"):
        with pytest.raises(ParameterError) as here:
            render(template, CONTEXT)
        with pytest.raises(ParameterError) as there:
            process.render(template, CONTEXT)
        assert (str(there.value), there.value.param) == (str(here.value), "messages")
    first = process._process
    assert process.render(PLAIN, CONTEXT)
    assert process._process is first
    with pytest.raises(ParameterError, match="not JSON"):
        process.render(PLAIN, {"messages": [object()]})


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_without_an_end_is_an_error_and_refused_at_once_from_then_on(template: str):
    process = TemplateProcess()
    with pytest.raises(ParameterError, match="more than 2 seconds of CPU time") as caught:
        process.render(template, CONTEXT)
    assert caught.value.param == "messages"
    started = process._process
    with pytest.raises(ParameterError, match="more than 2 seconds"):
        process.render(template, CONTEXT)
    assert process._process is started is None, "no second try"
    assert process.render(PLAIN, CONTEXT).startswith("<s>")


def test_a_text_that_doubles_for_ever_is_an_error_and_takes_bounded_memory():
    process = TemplateProcess()
    with pytest.raises(ParameterError):
        process.render(HUGE, CONTEXT)
    assert process.render(PLAIN, CONTEXT)


def test_a_process_that_was_killed_is_replaced():
    process = TemplateProcess()
    process.render(PLAIN, CONTEXT)
    assert process._process is not None
    process._process.kill()
    process._process.wait()
    assert process.render(PLAIN, CONTEXT)


def test_the_process_ends_with_its_owner():
    process = TemplateProcess()
    process.render(PLAIN, CONTEXT)
    child = process._process
    assert child is not None
    del process
    gc.collect()
    assert child.poll() is not None


def test_only_a_template_that_is_not_the_checkpoints_leaves_this_process(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    tokenizer.render_chat(CONTEXT["messages"])
    monkeypatch.setattr(chat_template.TemplateProcess, "render", lambda *_: "elsewhere")
    assert tokenizer.render_chat(CONTEXT["messages"]) != "elsewhere"
    assert tokenizer.render_chat(CONTEXT["messages"], template=PLAIN) == "elsewhere"


def test_requests_of_others_are_answered_while_an_adapters_template_loops(
    launch: Callable[..., Running], tmp_path: Path
):
    server = launch()
    folder = write_adapter(server.adapters / "loop", "never said")
    (folder / "chat_template.jinja").write_text(ENDLESS["one comparison in C"])
    load = {"lora_name": "loop", "lora_path": str(folder)}
    assert server.post("/v1/load_lora_adapter", load).status_code == 200
    body = {"messages": CONTEXT["messages"]}
    got = []
    asking = [
        threading.Thread(
            target=lambda: got.append(
                server.post("/v1/chat/completions", {**body, "model": "loop"})
            )
        )
        for _ in range(3)
    ]
    begun = time.monotonic()
    for thread in asking:
        thread.start()
    answered = 0
    while any(thread.is_alive() for thread in asking):
        assert server.post("/v1/chat/completions", body).status_code == 200
        answered += 1
    assert time.monotonic() - begun < 60
    assert answered > 3
    assert [reply.status_code for reply in got] == [400] * 3
    assert all("CPU time" in reply.json()["error"]["message"] for reply in got)
