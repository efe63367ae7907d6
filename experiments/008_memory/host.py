"""Host memory of adapters alone, without model and engine: what a process grows by when it reads and
stages some on 8 threads, as a start does, and what `malloc_trim` gives back of it. Linux with glibc."""

import ctypes
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp

from jlora.adapters.peft import read_adapter
from jlora.adapters.pool import RankPages, StagedAdapter
from jlora.adapters.store import READERS
from jlora.benchmark.adapters import write_random_adapters
from jlora.benchmark.shapes import shape_config
from jlora.benchmark.subjects import process_memory
from jlora.sharding import Layout, make_mesh


def main(count: int) -> int:
    cfg = shape_config("llama-3.1-8b")
    pages = RankPages(cfg, Layout(cfg, 1), make_mesh(1), 1, jnp.bfloat16, page_rows=16)

    def read(folder: Path) -> StagedAdapter:
        return pages.stage(read_adapter(folder, cfg))

    with tempfile.TemporaryDirectory() as root:
        folders = write_random_adapters(root, cfg, [16] * count)
        trim()  # else what writing them left behind is used again, and not seen
        before = anonymous()
        with ThreadPoolExecutor(READERS) as readers:
            staged = list(readers.map(read, folders.values()))
    grown = anonymous() - before
    trim()
    left = anonymous() - before
    own = sum(one.nbytes for one in staged)
    print(
        f"{count} adapters: copies {own / 1e6:.0f} MB, process +{grown / 1e6:.0f} MB, "
        f"after malloc_trim +{left / 1e6:.0f} MB"
    )
    return 0


def trim() -> None:
    """Gives the operating system what malloc keeps of memory that was freed."""
    ctypes.CDLL(None).malloc_trim(0)


def anonymous() -> float:
    """Bytes of this process that are of no file."""
    return process_memory()["rss_anonymous"]


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
