"""What the adapter store hands out (`AdapterEntry`, `Placement`, `Drain`), and its two gates:
`check_name` for names that users choose, `allowed_path` for folders that users name.
"""

import os
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from jlora.adapters.peft import READ_FILES
from jlora.errors import AdapterError, AdapterNotFound

Tier = Literal["disk", "loading", "host", "device"]
MAX_NAME = 256


class Staged(Protocol):
    """An adapter in host memory, ready to be copied to the device (pool.StagedAdapter)."""

    @property
    def uid(self) -> str: ...
    @property
    def base_model(self) -> str | None: ...
    @property
    def rank(self) -> int: ...
    @property
    def modules(self) -> tuple[str, ...]: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def bound(self) -> int: ...
    @property
    def scalings(self) -> tuple[float, ...]: ...
    @property
    def added_tokens(self) -> int: ...
    @property
    def tokenizer(self) -> Any | None: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def pages(self) -> int: ...


S = TypeVar("S", bound=Staged)


def content_of(staged: Staged) -> dict[str, Any]:
    """What an entry says of its content, by field."""
    names = (
        *("uid", "rank", "modules", "pages", "bound", "scalings", "base_model", "chat_template"),
        *("added_tokens", "tokenizer", "eos_ids"),
    )
    return {name: getattr(staged, name) for name in names}


@dataclass(eq=False, kw_only=True)
class AdapterEntry:
    """A loaded adapter under its name. The store alone changes it; compare by identity.

    `uid` and `generation` change in place only when a folder that had fallen back to disk turns
    out to have other content, and only while no scheduled sequence can depend on the old one.
    """

    name: str
    path: str
    generation: int
    """Unique per load: never used twice."""
    uid: str
    """Hash of the content; prefix-cache keys start from it."""
    rank: int
    modules: tuple[str, ...]
    pages: int
    """Rank pages that it takes on the device."""
    nbytes: int
    """Bytes of its host copy."""
    bound: int = 0
    """Modules (layer and projection) that it changes."""
    scalings: tuple[float, ...] = ()
    """Different scalings of its modules, in ascending order."""
    pinned: bool = False
    mix: tuple[tuple["AdapterEntry", float], ...] = ()
    """The weighted adapters that it is the sum of, if it is a mix (see `mix`)."""
    base_model: str | None = None
    chat_template: str | None = None
    added_tokens: int = 0
    """Tokens of its own, beyond the base's vocabulary."""
    tokenizer: Any | None = None
    """Its own tokenizer (`tokenizer.Tokenizer`); None: the base's."""
    eos_ids: tuple[int, ...] = ()
    """Tokens that end its generations beside the base's."""
    tier: Tier = "disk"
    """The fastest tier that holds it."""
    in_flight: int = 0
    """Requests that hold it, waiting ones included."""
    last_use: float = field(default_factory=time.time)
    """Unix time of the last acquire or release."""
    load_seconds: float = 0.0
    """Duration of its last read and staging."""
    error: str | None = None
    """Why the last background read failed; its waiting requests fail with this text."""

    @property
    def label(self) -> str:
        """The name in metrics: users may make any number of mixes."""
        return "(mix)" if self.mix else self.name

    def summary(self) -> str:
        """The log's line about a load."""
        facts = {
            "adapter": self.name,
            "modules_bound": self.bound,
            "projections": "+".join(self.modules),
            "rank": self.rank,
            "scaling": "+".join(f"{scaling:g}" for scaling in self.scalings),
            "bytes": self.nbytes,
            "seconds": f"{self.load_seconds:.2f}",
            "path": self.path,
        }
        return " ".join(f"{key}={value}" for key, value in facts.items())

    def facts(self) -> dict[str, object]:
        """The entry as GET /v1/adapters shows it."""
        return {
            "name": self.name,
            "path": self.path,
            "generation": self.generation,
            "uid": self.uid,
            "base_model": self.base_model,
            "rank": self.rank,
            "modules": list(self.modules),
            "bound": self.bound,
            "scalings": list(self.scalings),
            "pages": self.pages,
            "bytes": self.nbytes,
            "tier": self.tier,
            "pinned": self.pinned,
            "in_flight": self.in_flight,
            "last_use": self.last_use,
            "load_seconds": self.load_seconds,
            "error": self.error,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement(Generic[S]):
    """An adapter that has its rank pages. Before the step, `staged` must be written to `pages`;
    where it was there already, `staged` is None and `pages` is empty."""

    entry: AdapterEntry
    staged: S | None
    pages: tuple[int, ...]


class Drain:
    """An unload under way: the name is gone, running requests finish, then memory is freed."""

    def __init__(self, entry: AdapterEntry):
        self.entry = entry
        self.host_bytes = 0
        """Host memory freed."""
        self.device_bytes = 0
        """Device memory freed: its rank pages, ready for other adapters."""
        self._done = threading.Event()

    def finish(self, host_bytes: int, device_bytes: int) -> None:
        """Called once by the store."""
        self.host_bytes, self.device_bytes = host_bytes, device_bytes
        self._done.set()

    @property
    def done(self) -> bool:
        """Whether the memory is freed."""
        return self._done.is_set()

    @property
    def freed_bytes(self) -> int:
        """Host and device bytes freed; 0 until `done`."""
        return self.host_bytes + self.device_bytes

    def wait(self, timeout: float | None = None) -> int | None:
        """Freed bytes, or None if requests were still running after `timeout` seconds."""
        return self.freed_bytes if self._done.wait(timeout) else None


@dataclass(frozen=True, kw_only=True)
class StoreCounters:
    """Totals since the start."""

    loads: int
    """Reads from disk that succeeded: loads, reloads and returns from the disk tier."""
    load_failures: int
    unloads: int
    hits: dict[str, int]
    """Requests by the tier in which they found their adapter: device, host or disk."""
    evictions: dict[str, int]
    """Adapters pushed out of the host and the device tier to make room."""
    host_bytes: int
    """Host bytes in use now."""
    device_pages: int
    """Rank pages in use now."""


def check_name(name: str, reserved: Collection[str]) -> None:
    """AdapterError unless `name` can be told from paths, `base:adapter` and base models."""
    why = None
    if not isinstance(name, str) or not name or name != name.strip():
        why = f"adapter name {name!r} is empty or starts or ends with a space"
    elif len(name) > MAX_NAME:
        why = f"adapter name has {len(name)} characters, at most {MAX_NAME} are allowed"
    elif name in reserved:
        why = f"The lora adapter '{name}' conflicts with a served base model."
    elif bad := sorted({char for char in name if char in "/\\:" or not char.isprintable()}):
        why = (
            f"adapter name {name!r} holds {', '.join(map(repr, bad))}; slashes, colons and control "
            "characters are not allowed"
        )
    elif name in (".", ".."):
        why = f"adapter name {name!r} is a path"
    if why is not None:
        raise AdapterError(why, "lora_name")


def allowed_path(path: str | Path, roots: Collection[str | Path]) -> Path:
    """The real path of an adapter folder below one of `roots` (--lora-dir), symlinks resolved.

    The files that will be read must lie below a root too: a link to a secret is not followed.
    """
    if not roots:
        raise AdapterError("loading adapters at run time is off; start with --lora-dir ROOT")
    if not str(path).isprintable():
        raise AdapterError(f"adapter path {str(path)!r} holds control characters")
    allowed = [os.path.realpath(root) for root in roots]

    def inside(real: str) -> bool:
        return any(os.path.commonpath([real, root]) == root for root in allowed)

    real = os.path.realpath(path)
    # Before any look at the disk's content: what exists elsewhere stays unknown.
    if not inside(real):
        raise AdapterError(
            f"adapter path {str(path)!r} is outside of the folders given with --lora-dir"
        )
    if not os.path.isdir(real):
        raise AdapterNotFound(f"No adapter found for {path}")
    for name in READ_FILES:
        if not inside(os.path.realpath(os.path.join(real, name))):
            raise AdapterError(
                f"{name} in {str(path)!r} is a link out of the folders given with --lora-dir"
            )
    return Path(real)
