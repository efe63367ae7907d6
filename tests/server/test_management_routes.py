"""Loading, unloading and listing adapters over HTTP: vLLM's, SageMaker's and SGLang's forms."""

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from jlora.tokenizer import Tokenizer
from tests.server.conftest import Running
from tests.server.fakes import write_adapter


def load(server: Running, name: str, path: Path | str, **extra: Any) -> str:
    body = {"lora_name": name, "lora_path": str(path), **extra}
    return server.client().post("load_lora_adapter", cast_to=str, body=body)


def say(server: Running, model: str) -> str:
    return (
        server.client().completions.create(model=model, prompt="x", max_tokens=99).choices[0].text
    )


def names(server: Running) -> list[str]:
    return [card.id for card in server.client().models.list().data]


def test_load_serve_unload(server: Running):
    folder = write_adapter(server.adapters / "meow", "Meow")
    assert load(server, "cat", folder) == "Success: LoRA adapter 'cat' added successfully."
    assert names(server)[-1] == "cat"
    assert say(server, "cat") == "Meow"
    text = server.client().post("unload_lora_adapter", cast_to=str, body={"lora_name": "cat"})
    assert text.startswith("Success: LoRA adapter 'cat' removed successfully.")
    assert "Freed 1000 bytes of host" in text
    assert "cat" not in names(server)
    with pytest.raises(openai.NotFoundError):
        say(server, "cat")


def test_load_inplace_replaces_and_its_absence_refuses(server: Running):
    meow, woof = (write_adapter(server.adapters / word, word) for word in ("Meow", "Woof"))
    load(server, "pet", meow)
    with pytest.raises(openai.BadRequestError, match="already been loaded"):
        load(server, "pet", woof)
    assert say(server, "pet") == "Meow"
    load(server, "pet", woof, load_inplace=True)
    assert say(server, "pet") == "Woof"
    assert names(server).count("pet") == 1


def test_sagemakers_names_are_accepted(server: Running):
    folder = write_adapter(server.adapters / "sage", "sage words")
    got = server.post("/v1/load_lora_adapter", {"name": "sage", "src": str(folder)})
    assert got.status_code == 200
    assert say(server, "sage") == "sage words"
    assert server.post("/v1/unload_lora_adapter", {"name": "sage"}).status_code == 200


def test_a_relative_path_is_below_a_root(server: Running):
    write_adapter(server.adapters / "deep" / "er", "deep")
    load(server, "deep", "deep/er")
    assert say(server, "deep") == "deep"


def test_a_relative_path_may_count_from_the_servers_working_directory(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    write_adapter(server.adapters / "cat", "Meow")
    monkeypatch.chdir(server.adapters.parent)
    load(server, "a", "adapters/cat")
    load(server, "b", "./adapters/cat")
    assert say(server, "a") == say(server, "b") == "Meow"


def test_the_working_directory_is_no_root(server: Running, monkeypatch: pytest.MonkeyPatch):
    outside = write_adapter(server.adapters.parent / "outside", "secret")
    monkeypatch.chdir(server.adapters.parent)
    for path in ("outside", "./outside", "adapters/../outside", "absent"):
        got = server.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path})
        error = got.json()["error"]
        assert got.status_code in (400, 404)
        assert str(outside) not in error["message"]
    assert error["message"] == "Loading lora x failed: No adapter found for absent"
    assert "x" not in names(server)


@pytest.mark.parametrize(
    ("name", "path", "status", "kind", "words"),
    [
        ("", "x", 400, "InvalidUserInput", "Both 'lora_name' and 'lora_path'"),
        ("x", "", 400, "InvalidUserInput", "Both 'lora_name' and 'lora_path'"),
        ("tiny", "shout", 400, "InvalidUserInput", "conflicts with a served base model"),
        ("shout", "whisper", 400, "InvalidUserInput", "already been loaded"),
        (
            "new",
            "absent",
            404,
            "NotFoundError",
            "Loading lora new failed: No adapter found for absent",
        ),
        ("new", "broken", 400, "InvalidUserInput", "not JSON"),
        ("new", "empty", 400, "InvalidUserInput", "text.txt is missing"),
        ("a/b", "shout", 400, "InvalidUserInput", "not allowed"),
        ("a:b", "shout", 400, "InvalidUserInput", "not allowed"),
        ("new", "../../etc", 400, "InvalidUserInput", "outside"),
        ("new", "/etc", 400, "InvalidUserInput", "outside"),
        ("new", "link", 400, "InvalidUserInput", "outside"),
        ("new", "nul\0byte", 400, "InvalidUserInput", "path"),
        ("new", "x" * 5000, 404, "NotFoundError", "No adapter found"),
    ],
)
def test_a_bad_load_says_why_and_changes_nothing(
    server: Running, tmp_path: Path, name: str, path: str, status: int, kind: str | None, words: str
):
    write_adapter(server.adapters / "broken", "BROKEN")
    (server.adapters / "empty").mkdir()
    outside = write_adapter(tmp_path / "outside", "secret")
    os.symlink(outside, server.adapters / "link")
    got = server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
    error = got.json()["error"]
    assert got.status_code == status, error
    assert words in error["message"]
    assert error["code"] == status
    assert kind is None or error["type"] == kind
    assert names(server) == ["tiny", "tiny-alias", "shout", "whisper"]
    assert say(server, "shout") == "SHOUT SHOUT SHOUT"


def test_unloading_what_is_not_there_is_a_404(server: Running):
    for body, status in (({"lora_name": "ghost"}, 404), ({}, 400), ({"lora_name": ""}, 400)):
        assert server.post("/v1/unload_lora_adapter", body).status_code == status


def test_management_is_off_without_lora_dir(launch: Callable[..., Running]):
    server = launch(lora_dir=False)
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        got = server.post(path, {"lora_name": "shout", "lora_path": "x"})
        assert got.status_code == 404
        assert "--lora-dir" in got.json()["error"]["message"]
    assert (
        server.post("/load_lora_adapter", {"lora_name": "a", "lora_path": "b"}).status_code == 400
    )
    assert say(server, "shout") == "SHOUT SHOUT SHOUT"


def test_unload_lets_running_requests_end_then_frees(server: Running):
    server.engine.hold()
    got: list[str] = []
    asking = threading.Thread(target=lambda: got.append(say(server, "shout")))
    asking.start()
    server.wait(lambda: server.engine.active)
    replies: list[str] = []
    unloading = threading.Thread(
        target=lambda: replies.append(
            server.post("/v1/unload_lora_adapter", {"lora_name": "shout"}).text
        )
    )
    unloading.start()
    server.wait(lambda: "shout" not in names(server))
    assert server.post("/v1/completions", {"model": "shout", "prompt": "x"}).status_code == 404
    assert not replies
    server.engine.go_on()
    asking.join(10)
    unloading.join(10)
    assert got == ["SHOUT SHOUT SHOUT"]
    assert "Freed 1000 bytes" in replies[0]


def test_a_reload_leaves_running_requests_on_the_old_weights(server: Running):
    old = write_adapter(server.adapters / "old", "old old old old")
    new = write_adapter(server.adapters / "new", "new new")
    load(server, "pet", old)
    server.engine.hold()
    got: list[str] = []
    asking = threading.Thread(target=lambda: got.append(say(server, "pet")))
    asking.start()
    server.wait(lambda: server.engine.active)
    load(server, "pet", new, load_inplace=True)
    server.engine.go_on()
    asking.join(10)
    assert got == ["old old old old"]
    assert say(server, "pet") == "new new"


def test_a_reload_while_a_request_is_tokenized_gives_it_the_new_weights(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    new = write_adapter(server.adapters / "new", "new new")
    encode = Tokenizer.encode

    def slow(self: Tokenizer, text: str, **options: bool) -> list[int]:
        if text == "reload now":
            server.llm.store.load("shout", new, replace=True)
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", slow)
    got = server.client().completions.create(model="shout", prompt="reload now")
    assert got.choices[0].text == "new new"


# Steps as SGLang's test of dynamic loading writes them: what is done, what is there afterwards.
SCRIPT: list[tuple[str, str, set[str], str | None]] = [
    ("FORWARD", "a", set(), "does not exist"),
    ("LOAD", "a", {"a"}, None),
    ("FORWARD", "a", {"a"}, None),
    ("LOAD", "a", {"a"}, "already been loaded"),
    ("LOAD", "b", {"a", "b"}, None),
    ("UNLOAD", "ghost", {"a", "b"}, "cannot be found"),
    ("UNLOAD", "a", {"b"}, None),
    ("FORWARD", "a", {"b"}, "does not exist"),
    ("FORWARD", "b", {"b"}, None),
    ("LOAD", "a", {"a", "b"}, None),
    ("FORWARD", "a", {"a", "b"}, None),
    ("UNLOAD", "b", {"a"}, None),
    ("UNLOAD", "b", {"a"}, "cannot be found"),
    ("LOAD", "broken", {"a"}, "not JSON"),
    ("UNLOAD", "a", set(), None),
]


def test_a_script_of_sglang_operations(server: Running):
    for name in ("shout", "whisper"):
        server.post("/unload_lora_adapter", {"lora_name": name})
    for name, text in (("a", "aaa"), ("b", "bbb"), ("broken", "BROKEN")):
        write_adapter(server.adapters / name, text)
    for step, (operation, name, there, words) in enumerate(SCRIPT):
        if operation == "FORWARD":
            got = server.post("/generate", {"text": "x", "lora_path": name})
            assert got.status_code == (200 if words is None else 404), (step, got.text)
            error = "" if words is None else got.json()["error"]["message"]
            if words is None:
                assert got.json()["text"] == name * 3
        else:
            body = {"lora_name": name}
            if operation == "LOAD":
                body["lora_path"] = str(server.adapters / name)
            got = server.post(f"/{operation.lower()}_lora_adapter", body)
            assert got.status_code == (200 if words is None else 400), (step, got.text)
            assert got.json()["success"] is (words is None)
            assert set(got.json()["loaded_adapters"]) == there, step
            error = got.json()["error_message"]
        assert (words or "") in error, (step, error)


def test_bad_loads_during_traffic_touch_nobody(server: Running):
    write_adapter(server.adapters / "broken", "BROKEN")

    async def both() -> None:
        client = server.async_client()

        async def good() -> None:
            for _ in range(5):
                got = await client.completions.create(model="shout", prompt="x", max_tokens=99)
                assert got.choices[0].text == "SHOUT SHOUT SHOUT"

        async def bad(path: str) -> None:
            for _ in range(5):
                with pytest.raises(openai.APIStatusError) as caught:
                    await client.post(
                        "load_lora_adapter", cast_to=str, body={"lora_name": "n", "lora_path": path}
                    )
                assert 400 <= caught.value.status_code < 500

        await asyncio.gather(good(), good(), bad("broken"), bad("absent"), bad("/etc"))

    asyncio.run(both())


def test_the_adapter_list_tells_everything(server: Running):
    say(server, "shout")
    (shout, whisper) = server.get("/v1/adapters").json()["data"]
    assert shout["name"] == "shout"
    assert shout["path"] == str(server.adapters / "shout")
    assert (shout["rank"], shout["bytes"], shout["pinned"]) == (8, 1000, False)
    assert shout["modules"] == ["q_proj", "v_proj"]
    assert (shout["bound"], shout["scalings"]) == (4, [2.0])
    assert shout["tier"] in {"host", "device"}
    assert shout["in_flight"] == 0
    assert shout["last_use"] >= whisper["last_use"]
    assert shout["load_seconds"] >= 0


def test_a_pinned_load_shows(server: Running):
    write_adapter(server.adapters / "pin", "pin")
    load(server, "pin", "pin", pinned=True)
    assert server.get("/v1/adapters").json()["data"][-1]["pinned"] is True
