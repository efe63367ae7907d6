"""User mistakes are 4xx in OpenAI's shape and name the field; nobody else is touched."""

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import Running

C, H = "/v1/completions", "/v1/chat/completions"
PROMPT: dict[str, Any] = {"model": "tiny", "prompt": "x"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}

MISTAKES: list[tuple[str, dict[str, Any], int, str | None]] = [
    (C, {"model": "tiny"}, 400, "prompt"),
    (C, {**PROMPT, "model": "nobody"}, 404, "model"),
    (C, {**PROMPT, "model": "tiny:nobody"}, 404, "model"),
    (C, {**PROMPT, "model": "tiny:"}, 404, "model"),
    (C, {**PROMPT, "model": ""}, 404, "model"),
    (C, {**PROMPT, "model": 3}, 400, "model"),
    (C, {**PROMPT, "lora_path": "nobody"}, 404, "model"),
    (C, {**PROMPT, "prompt": ""}, 400, "prompt"),
    (C, {**PROMPT, "prompt": []}, 400, "prompt"),
    (C, {**PROMPT, "prompt": [[]]}, 400, "prompt"),
    (C, {**PROMPT, "prompt": ["a", 1]}, 400, "prompt"),
    (C, {**PROMPT, "prompt": [1.5]}, 400, "prompt"),
    (C, {**PROMPT, "prompt": [True]}, 400, "prompt"),
    (C, {**PROMPT, "prompt": {"text": "x"}}, 400, "prompt"),
    (C, {**PROMPT, "prompt": [-1]}, 400, "prompt"),
    (C, {**PROMPT, "prompt": [10**9]}, 400, "prompt"),
    (C, {**PROMPT, "prompt": [10**30]}, 400, "prompt"),
    (C, {**PROMPT, "prompt": [5] * 300}, 400, "prompt"),
    (C, {**PROMPT, "prompt": [[5]] * 5000}, 400, "prompt"),
    (C, {**PROMPT, "max_tokens": 300}, 400, "max_tokens"),
    (C, {**PROMPT, "max_tokens": -1}, 400, "max_tokens"),
    (C, {**PROMPT, "max_tokens": 1.5}, 400, "max_tokens"),
    (C, {**PROMPT, "max_tokens": 10**400}, 400, "max_tokens"),
    (C, {**PROMPT, "temperature": -0.1}, 400, "temperature"),
    (C, {**PROMPT, "temperature": "hot"}, 400, "temperature"),
    (C, {**PROMPT, "top_p": 0}, 400, "top_p"),
    (C, {**PROMPT, "top_p": 1.1}, 400, "top_p"),
    (C, {**PROMPT, "top_k": -2}, 400, "top_k"),
    (C, {**PROMPT, "min_p": 2}, 400, "min_p"),
    (C, {**PROMPT, "presence_penalty": 3}, 400, "presence_penalty"),
    (C, {**PROMPT, "frequency_penalty": -3}, 400, "frequency_penalty"),
    (C, {**PROMPT, "repetition_penalty": 0}, 400, "repetition_penalty"),
    (C, {**PROMPT, "n": 0}, 400, "n"),
    (C, {**PROMPT, "n": 10**9}, 400, "n"),
    (C, {**PROMPT, "n": 2, "temperature": 0}, 400, "n"),
    (C, {**PROMPT, "best_of": 3}, 400, "best_of"),
    (C, {**PROMPT, "seed": 2**70}, 400, "seed"),
    (C, {**PROMPT, "stop": [""]}, 400, "stop"),
    (C, {**PROMPT, "stop": ["s"] * 100}, 400, "stop"),
    (C, {**PROMPT, "stop": 5}, 400, "stop"),
    (C, {**PROMPT, "stop_token_ids": [10**9]}, 400, "stop_token_ids"),
    (C, {**PROMPT, "logprobs": 21}, 400, "logprobs"),
    (C, {**PROMPT, "logprobs": -1}, 400, "logprobs"),
    (C, {**PROMPT, "prompt_logprobs": 99}, 400, "prompt_logprobs"),
    (C, {**PROMPT, "logit_bias": {"x": 1}}, 400, "logit_bias"),
    (C, {**PROMPT, "logit_bias": {"999999": 1}}, 400, "logit_bias"),
    (C, {**PROMPT, "logit_bias": {str(i): 1 for i in range(513)}}, 400, "logit_bias"),
    (C, {**PROMPT, "min_tokens": 20}, 400, "min_tokens"),
    (C, {**PROMPT, "suffix": "end"}, 400, "suffix"),
    (C, {**PROMPT, "use_beam_search": True}, 400, "use_beam_search"),
    (C, {**PROMPT, "guided_json": {}}, 400, "guided_json"),
    (C, {**PROMPT, "structured_outputs": {"json": {}}}, 400, "structured_outputs"),
    (C, {**PROMPT, "temprature": 1}, 400, "temprature"),
    (C, {**PROMPT, "stream": "yes"}, 400, "stream"),
    (C, {**PROMPT, "stream_options": {"include_usage": True}}, 400, "stream_options"),
    (C, {**PROMPT, "stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x"),
    (H, {**CHAT, "messages": []}, 400, "messages"),
    (H, {"model": "tiny"}, 400, "messages"),
    (H, {**CHAT, "messages": [{"content": "no role"}]}, 400, "messages.0.role"),
    (H, {**CHAT, "messages": "hi"}, 400, "messages"),
    (
        H,
        {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages",
    ),
    (H, {**CHAT, "messages": [{"role": "user", "content": "x " * 500}]}, 400, "prompt"),
    (H, {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    (H, {**CHAT, "tool_choice": "required"}, 400, "tool_choice"),
    (H, {**CHAT, "functions": [{"name": "f"}]}, 400, "functions"),
    (H, {**CHAT, "response_format": {"type": "json_object"}}, 400, "response_format"),
    (H, {**CHAT, "modalities": ["audio"]}, 400, "modalities"),
    (H, {**CHAT, "chat_template": "{{ 1 }}"}, 400, "chat_template"),
    (H, {**CHAT, "chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs"),
    (H, {**CHAT, "top_logprobs": 2}, 400, "top_logprobs"),
    (H, {**CHAT, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    (H, {**CHAT, "max_tokens": 0}, 400, "max_tokens"),
    (H, {**CHAT, "max_tokens": 300}, 400, "max_tokens"),
    (H, {**CHAT, "max_completion_tokens": 0}, 400, "max_completion_tokens"),
    (H, {**CHAT, "max_completion_tokens": 300}, 400, "max_completion_tokens"),
    (C, {**PROMPT, "model": "shout*2+shout*1"}, 400, "model"),
    (C, {**PROMPT, "model": "shout*1e9"}, 400, "model"),
    (H, {**CHAT, "echo": True}, 400, "echo"),
    (H, {**CHAT, "nonsense": None}, 400, "nonsense"),
    ("/generate", {}, 400, "text"),
    ("/generate", {"text": "a", "input_ids": [1]}, 400, "text"),
    ("/generate", {"text": "a", "sampling_params": {"regex": "a"}}, 400, "sampling_params.regex"),
    ("/generate", {"text": "a", "sampling_params": {"bad": 1}}, 400, "sampling_params"),
    ("/generate", {"text": ["a", "b"], "stream": True}, 400, "stream"),
    ("/generate", {"text": ["a", "b"], "lora_path": ["shout"]}, 400, "lora_path"),
    ("/generate", {"text": "a", "image_data": "x"}, 400, "image_data"),
    ("/generate", {"text": "a", "lora_path": "nobody"}, 404, "lora_path"),
    ("/tokenize", {}, 400, "prompt"),
    ("/tokenize", {"prompt": "x", "model": "nobody"}, 404, "model"),
    ("/detokenize", {"tokens": [10**9]}, 400, "tokens"),
    ("/detokenize", {"tokens": "x"}, 400, "tokens"),
    ("/v1/load_lora_adapter", {"lora_name": 5, "lora_path": "x"}, 400, "lora_name"),
    ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "x", "evil": 1}, 400, "evil"),
    ("/v1/load_lora_adapter", {"lora_path": "x"}, 400, "lora_name"),
    ("/v1/load_lora_adapter", {"lora_name": "x"}, 400, "lora_path"),
    ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "absent"}, 404, "lora_path"),
    ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/etc"}, 400, "lora_path"),
    ("/v1/load_lora_adapter", {"lora_name": "tiny", "lora_path": "shout"}, 400, "lora_name"),
    ("/v1/load_lora_adapter", {"lora_name": "shout", "lora_path": "shout"}, 400, "lora_name"),
    ("/v1/load_lora_adapter", {"lora_name": "a/b", "lora_path": "shout"}, 400, "lora_name"),
    ("/v1/unload_lora_adapter", {}, 400, "lora_name"),
    ("/v1/unload_lora_adapter", {"lora_name": "ghost"}, 404, "lora_name"),
]


def test_every_mistake_is_a_4xx_that_names_its_field(server: Running):
    for path, body, status, param in MISTAKES:
        got = server.post(path, body)
        error = got.json()["error"]
        assert got.status_code == status, (body, error)
        assert error["param"] is not None
        assert error["param"].startswith(param), (body, error)
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert "\n" not in error["message"]
        assert len(error["message"]) < 700
    assert not server.engine.active


@pytest.mark.parametrize(
    ("path", "body", "field", "meant"),
    [
        (C, PROMPT, "max_token", "did you mean max_tokens?"),
        (C, PROMPT, "topK", "did you mean top_k"),
        (C, PROMPT, "quux", "check its spelling"),
        (H, CHAT, "max_completions_tokens", "did you mean max_completion_tokens"),
        ("/generate", {"text": "a"}, "lora", "did you mean lora_path?"),
        (
            "/generate",
            {"text": "a"},
            "sampling_params.max_tokens",
            "did you mean max_new_tokens",
        ),
        (C, {**PROMPT, "stream": True}, "stream_options.usage", "check its spelling"),
        ("/v1/unload_lora_adapter", {"lora_name": "a"}, "lora_names", "did you mean lora_name"),
    ],
)
def test_an_unknown_field_is_answered_with_the_nearest_ones(
    server: Running, path: str, body: dict[str, Any], field: str, meant: str
):
    outer, _, inner = field.partition(".")
    error = server.post(path, {**body, outer: {inner: 1} if inner else 1}).json()["error"]
    assert error["message"].startswith(f"unknown field {field!r}: {meant}")
    assert error["param"] == field


@pytest.mark.parametrize(
    ("path", "body", "start"),
    [
        (C, {**PROMPT, "stop": 5}, "stop: "),
        (C, {**PROMPT, "logit_bias": {"5": "x"}}, "logit_bias: "),
        (H, {**CHAT, "messages": [{"role": "user", "content": 5}]}, "messages.0.content: "),
        (H, {**CHAT, "messages": [{"role": 1, "content": "x"}]}, "messages.0.role: "),
        ("/generate", {"text": "a", "sampling_params": {"n": 0}}, "sampling_params.n: "),
        ("/generate", {"text": "a", "lora_path": 5}, "lora_path: "),
        ("/generate", {"input_ids": ["x"]}, "input_ids.0: "),
    ],
)
def test_an_error_names_fields_as_the_client_wrote_them(
    server: Running, path: str, body: dict[str, Any], start: str
):
    error = server.post(path, body).json()["error"]
    assert error["message"].startswith(start)
    assert start.startswith(error["param"])


def test_harmless_values_of_unsupported_fields_are_accepted(server: Running):
    """What bench clients and SDKs send without meaning anything by it."""
    body = {
        **CHAT,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "logprobs": None,
        "top_logprobs": 0,
        "best_of": 1,
        "max_tokens": 1,
        "spaces_between_special_tokens": True,
        "temperature": None,
        "stop": None,
        "stream": None,
    }
    assert server.post(H, body).status_code == 200


def test_an_unknown_model_lists_what_is_there(server: Running):
    with pytest.raises(openai.NotFoundError) as caught:
        server.client().completions.create(model="nobody", prompt="x")
    for name in ("nobody", "tiny", "shout", "whisper"):
        assert name in caught.value.message
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100_000,
     b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
     b'{"model": "tiny", "prompt": "x", "temperature": 1e999}'],
)  # fmt: skip
def test_malformed_json_is_a_400(server: Running, data: bytes):
    for path in (C, H, "/tokenize", "/generate", "/v1/load_lora_adapter"):
        got = httpx.post(
            server.url + path, content=data, headers={"content-type": "application/json"}
        )
        assert got.status_code == 400, (path, got.text)
        assert got.json()["error"]["message"]


def test_a_body_must_say_that_it_is_json(server: Running):
    got = httpx.post(
        server.url + C, content=json.dumps(PROMPT), headers={"content-type": "text/plain"}
    )
    assert got.status_code == 415


def test_a_huge_body_is_a_413_whether_it_says_so_or_not(launch: Callable[..., Running]):
    server = launch(max_body_bytes=10_000)
    body = json.dumps({**PROMPT, "prompt": "x" * 5_000_000}).encode()
    headers = {"content-type": "application/json"}
    assert httpx.post(server.url + C, content=body, headers=headers).status_code == 413

    def parts():
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    assert httpx.post(server.url + C, content=parts(), headers=headers).status_code == 413
    assert server.post(C, PROMPT).status_code == 200


def test_unknown_paths_and_methods_have_the_same_error_shape(server: Running):
    for method, path, status in (("GET", "/nope", 404), ("GET", C, 405), ("POST", "/health", 405)):
        got = httpx.request(method, server.url + path)
        assert got.status_code == status
        assert got.json()["error"]["code"] == status


def test_a_key_guards_everything_but_the_probes(launch: Callable[..., Running]):
    server = launch(api_key=("first", "second"))
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert server.get(path).status_code == 200, path
    for path in ("/v1/models", "/v1/adapters", "/v1/models/tiny"):
        assert server.get(path).status_code == 401, path
    for path in (C, H, "/generate", "/tokenize", "/v1/load_lora_adapter", "/unload_lora_adapter"):
        assert server.post(path, {}).status_code == 401, path
    for key in ("third", "firs", "first second"):
        headers = {"authorization": f"Bearer {key}"}
        assert server.get("/v1/models", headers=headers).status_code == 401, key
    assert server.get("/v1/models", headers={"authorization": "Basic first"}).status_code == 401
    with pytest.raises(openai.AuthenticationError):
        server.client("third").models.list()
    for key in ("first", "second"):
        assert server.client(key).models.list().data[0].id == "tiny"


def test_a_client_that_leaves_a_stream_frees_its_request(server: Running):
    body = {**PROMPT, "model": "shout", "stream": True, "ignore_eos": True, "max_tokens": 200}
    server.engine.pace = 0.02
    with httpx.stream("POST", server.url + C, json=body) as got:
        lines = got.iter_lines()  # kept: a generator that is dropped closes the connection
        next(lines)
        assert server.engine.active
    server.wait(lambda: not server.engine.active)
    assert server.llm.store.adapters()[0]["in_flight"] == 0


def test_a_client_that_leaves_before_the_reply_frees_its_request(server: Running):
    server.engine.hold()
    for extra in ({}, {"stream": True}, {"n": 3}):
        body = json.dumps({**PROMPT, "model": "shout", **extra}).encode()
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as sock:
            head = f"POST {C} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            sock.sendall(head.encode() + body)
            server.wait(lambda: server.engine.active)
        server.wait(lambda: not server.engine.active)
    assert server.llm.store.adapters()[0]["in_flight"] == 0


def test_an_adapter_that_breaks_on_disk_is_its_owners_error(server: Running):
    entry = server.llm.resolve("shout")
    assert entry is not None
    server.engine.hold()
    got: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda s=s: got.append(server.post(C, {**PROMPT, "model": "shout", "stream": s})))
        for s in (False, True)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    server.wait(lambda: len(server.engine.active) == 2)
    entry.error = "shout: the folder is gone"
    server.engine.go_on()
    for thread in threads:
        thread.join(10)
    assert [one.status_code for one in got] == [400, 400]
    assert all("the folder is gone" in one.json()["error"]["message"] for one in got)
    assert server.post(C, PROMPT).status_code == 200


def test_an_engine_that_has_stopped_is_a_503(server: Running):
    server.engine.ready = False
    assert server.get("/ready").status_code == 503
    assert server.get("/health").status_code == 503  # it never comes back: let it be restarted
    assert server.post(C, PROMPT).status_code == 503


def test_a_bug_of_ours_is_a_500_in_the_same_shape_and_the_server_lives(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "submit", fail)
        got = server.post(C, PROMPT)
    assert got.status_code == 500
    assert "ZeroDivisionError" in got.json()["error"]["message"]
    assert server.post(C, PROMPT).status_code == 200
