"""A real uvicorn on a free port in a thread, on the fake engine, and the real openai client."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from jlora.llm import LLM
from jlora.options import ServeOptions
from jlora.server.run import Server, bind, make_server
from jlora.tokenizer import Tokenizer
from tests import tiny
from tests.server.fakes import FakeEngine, fake_llm, write_adapter


@dataclass
class Running:
    """A server that listens."""

    llm: LLM
    server: Server
    thread: threading.Thread
    url: str
    adapters: Path
    """The folder that --lora-dir names."""

    @property
    def engine(self) -> FakeEngine:
        assert isinstance(self.llm.engine, FakeEngine)
        return self.llm.engine

    def client(self, key: str = "none") -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)

    def async_client(self) -> Any:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=30, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **options)

    def wait(self, condition: Callable[[], object], seconds: float = 10.0) -> None:
        """Until the condition holds; an error when it does not in time."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "timed out"
            time.sleep(0.005)

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(15)
        assert not self.thread.is_alive()


def start(llm: LLM, adapters: Path, **options: Any) -> Running:
    """Serve `llm` on a free port."""
    sock = bind("127.0.0.1", 0)
    started = threading.Event()
    chosen = ServeOptions(**{"shutdown_timeout": 1.0, **options})
    server = make_server(llm, chosen, version="1.2.3", on_start=started.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    thread.start()
    assert started.wait(15)
    return Running(llm, server, thread, url, adapters)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tokenizer_folder)


@pytest.fixture
def launch(tokenizer: Tokenizer, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """launch(**options) -> a running server with the adapters `shout` and `whisper`."""
    running: list[Running] = []

    def go(
        *, store: dict[str, int] | None = None, lora_dir: bool = True, **options: Any
    ) -> Running:
        llm = fake_llm(tokenizer, **(store or {}))
        root = tmp_path / "adapters"
        for name, text in (("shout", "SHOUT SHOUT SHOUT"), ("whisper", "whisper, whisper")):
            llm.store.load(name, write_adapter(root / name, text))
        dirs = (str(root),) if lora_dir else ()
        running.append(start(llm, root, lora_dir=dirs, **options))
        return running[-1]

    yield go
    for one in running:
        one.engine.go_on()
        one.stop()
        one.llm.close()


@pytest.fixture
def server(launch: Callable[..., Running]) -> Running:
    return launch()
