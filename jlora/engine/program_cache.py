"""Compiled programs kept on disk, so that a later start neither traces nor lowers them.

XLA's persistent cache is keyed by the lowered program, and lowering is most of a warm start: it is
Python, one program after the other. Here the key is all that lowering depends on: the sources of
jlora and its kernels, versions, flags, devices, and what the engine says of itself. Entries are
pickles, as much to be trusted as the folder they lie in (the user's own, like XLA's cache).
"""

import hashlib
import logging
import os
import pickle
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import flax
import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

import kernels_pallas
from kernels_pallas.hardware import load_runtime

log = logging.getLogger(__name__)

UNUSED_DAYS = 30
"""Entries that nothing has loaded for so long are deleted."""

_XLA_CACHE = threading.Lock()


class ProgramCache:
    """Programs by name, in a folder that engines share. A name must say whatever lowering takes from
    the engine, but for its mesh: engines that agree in it share the program."""

    def __init__(self, folder: Path | None, mesh: Mesh):
        """No `folder`: every program is compiled, none is kept."""
        load_runtime()
        self._folder, self._devices = folder, list(mesh.devices.flat)
        kinds = [(device.device_kind, device.id) for device in self._devices]
        client = self._devices[0].client.platform_version
        self._facts = repr((_environment(), client, kinds, mesh.shape, jax.process_index()))

    def has(self, name: str) -> bool:
        """Whether `load` will probably work."""
        return self._folder is not None and self._path(name).exists()

    def load(self, name: str, lower: Callable[[], jax.stages.Lowered]) -> Callable[..., Any]:
        """The program of this name; lowered and compiled if its entry is not there or damaged."""
        try:
            path = self._path(name)
            payload, in_tree, out_tree = pickle.loads(path.read_bytes())
            program = serialize_executable.deserialize_and_load(
                payload, in_tree, out_tree, execution_devices=self._devices
            )
            os.utime(path)
        # Whatever damaged bytes raise: the entry is worthless, the program is not.
        except Exception as error:
            log.info("%.80s is compiled again, its kept program is unusable: %s", name, error)
            return self.compile(name, lower())
        return program

    def compile(self, name: str, lowered: jax.stages.Lowered) -> Callable[..., Any]:
        """Compiles a program and keeps it. One that cannot be written is no error."""
        program = lowered.compile()
        if self._folder is None:
            return program
        path = self._path(name)
        own = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            entry = pickle.dumps(serialize_executable.serialize(program))
            path.parent.mkdir(parents=True, exist_ok=True)
            own.write_bytes(entry)
            own.replace(path)
        except (OSError, ValueError, NotImplementedError, pickle.PicklingError) as error:
            log.info("%.80s is not kept: %s", name, error)
            with suppress(OSError):
                own.unlink()
        return program

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """For calls of `compile`: switches XLA's own cache off. What XLA:CPU loads from there it
        cannot serialise again (functions are missing when the copy runs; jax 0.10 and 0.11)."""
        if self._folder is None:
            yield
            return
        with _XLA_CACHE:
            before = jax.config.values["jax_enable_compilation_cache"]
            _use_xla_cache(False)
            try:
                yield
            finally:
                _use_xla_cache(before)

    def prune(self) -> None:
        """Deletes entries that nobody has used for a long time."""
        oldest = time.time() - UNUSED_DAYS * 86400
        for path in self._folder.glob("*") if self._folder is not None else ():
            try:
                if path.stat().st_mtime < oldest:
                    path.unlink()
            except OSError:  # another process was faster
                continue

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / hashlib.sha256(f"{name} {self._facts}".encode()).hexdigest()


def _use_xla_cache(use: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", use)
    compilation_cache.reset_cache()  # the setting is read once


def abstract(arrays: Any) -> Any:
    """Shapes, types and places of a tree of arrays, in a form whose repr says all of them."""
    return jax.tree.map(lambda x: (x.shape, str(x.dtype), str(x.sharding.spec)), arrays)


def _environment() -> tuple[Any, ...]:
    """What lowering and compiling depend on beside the engine."""
    settings = {key: value for key, value in jax.config.values.items() if "cache" not in key}
    variables = {
        key: value
        for key, value in os.environ.items()
        if key.startswith(("XLA_", "JAX_", "LIBTPU")) and not key.endswith("_MEM_FRACTION")
    }
    return (
        _sources(),
        _versions(),
        _machine(),
        sorted(settings.items()),
        sorted(variables.items()),
    )


@lru_cache
def _versions() -> tuple[str, ...]:
    found = [sys.version, jax.__version__, flax.__version__]
    for name in ("jaxlib", "jax-cuda12-pjrt", "jax-cuda13-pjrt"):
        with suppress(PackageNotFoundError):
            found.append(version(name))
    return tuple(found)


@lru_cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in _files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _files() -> Iterator[Path]:
    for folder in (Path(__file__).parents[1], Path(kernels_pallas.__file__).parent):
        yield from sorted(folder.rglob("*.py"))


@lru_cache
def _machine() -> str:
    """The processor with its instruction sets: XLA:CPU compiles for the one that it runs on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    return " ".join(sorted({line for line in lines if line.startswith(wanted)}))
