"""From options to a running engine: config, mesh, weights, rank pages, store, K/V pages, programs.

The one place that knows how all parts fit together, and how memory is shared out between them.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jlora.adapter_text import AdapterTexts
from jlora.adapters.adapter import LEVELS, Adapter
from jlora.adapters.entry import AdapterEntry
from jlora.adapters.groups import page_bytes
from jlora.adapters.peft import read_adapter
from jlora.adapters.pool import RankPages, StagedAdapter
from jlora.adapters.store import AdapterStore
from jlora.demo.model import cache_folder, demo_model_folder
from jlora.device_memory import LARGEST_POOL, device_memory, start_backend
from jlora.engine.config import EngineConfig, buckets
from jlora.engine.engine import Engine
from jlora.engine.runner import Runner
from jlora.errors import ParameterError
from jlora.in_place import InPlace
from jlora.models.base import BaseWeights
from jlora.models.config import GROUPS, ModelConfig
from jlora.models.decoder import Decoder
from jlora.models.weights import abstract_decoder, dummy_weights, load_weights
from jlora.needs import Needs, needs
from jlora.options import ModelOptions, parse_bytes, parse_pages
from jlora.parts import MemoryPlan, Parts, Progress
from jlora.shape import Shape
from jlora.sharding import Layout, make_mesh
from jlora.tokenizer import Tokenizer
from kernels_pallas.hardware import is_hopper

log = logging.getLogger(__name__)

CPU_KV_BYTES = 1 << 30
"""K/V cache on a CPU unless told otherwise."""

LORA_RANK = 64
"""The default adapter budget holds max_loras adapters of this rank."""

EXPERTS_RANK = 16
"""The same where pages hold the ranks of every expert: they are as many times larger."""


@dataclass(frozen=True)
class _Platform:
    """Defaults that depend on the hardware."""

    max_num_seqs: int
    max_num_batched_tokens: int
    prefill_block: int
    rank_page: int
    """Rank rows of a rank page: what a tensor core multiplies at once; on a CPU what most adapters
    have, for there a step costs the bytes of its pages."""
    decode_buckets: tuple[int, ...]
    """The Hopper kernel pads to 8 rows anyway, and a step of 32 takes 4% longer than one of 8; on a CPU
    one row costs half of eight."""
    prefill_buckets: tuple[tuple[int, int], ...]
    """Steps with prompts by (decode rows, prompt tokens), beside the largest. Everybody waits for a
    step to end, and it computes its padding: a short prompt should not come in a large one."""
    whole_blocks: bool
    """Decode rows and prompt tokens of a step are together a multiple of ROW_BLOCKS, padding rows
    included, and `max_num_batched_tokens` counts both, as vLLM's does. A matmul with a few tiles more
    than there are SMs takes up to twice as long, and one of another number of rows is padded first.
    Decode rows alone are a multiple of 8 up to 64."""


ROW_BLOCKS = (128, 256)
"""Of steps of up to as many rows, and of larger ones."""

_PLATFORMS = {
    "cpu": _Platform(
        max_num_seqs=32,
        max_num_batched_tokens=256,
        prefill_block=16,
        rank_page=8,
        decode_buckets=(1, 8, 32),
        prefill_buckets=((8, 64),),
        whole_blocks=False,
    ),
    "gpu": _Platform(
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        prefill_block=64,
        rank_page=16,
        decode_buckets=(8, 32, 64, 128, 256),
        prefill_buckets=((64, 64), (64, 192), (256, 448)),
        whole_blocks=True,
    ),
}


def build_engine(options: ModelOptions, *, progress: Progress | None = None) -> Parts:
    """A started engine with its adapters loaded, all programs compiled.

    Raises ModelError, AdapterError or ParameterError with one line for the user.
    """
    programs_folder = persist_programs()
    tell = progress or (lambda what, done, total: None)
    folder = Path(options.model) if options.model else demo_model_folder(tell)
    cfg = ModelConfig.from_folder(folder)
    if options.max_model_len is not None and options.max_model_len > cfg.max_positions:
        raise ParameterError(
            f"--max-model-len {options.max_model_len} is more than the {cfg.max_positions} "
            f"positions of {cfg.name}",
            "max_model_len",
        )
    cfg = cfg.for_context(options.max_model_len or cfg.default_context)
    if cfg.rope.long:
        log.warning(
            "longrope's long factors hold for texts of all lengths; up to --max-model-len %d the "
            "short ones would, as transformers takes them",
            cfg.default_context,
        )
    base_cfg = cfg
    adapters = options.start_adapters
    held = needs(options, cfg, adapters)
    cfg = replace(cfg, extra_vocab=held.added_tokens)
    tokenizer = Tokenizer.from_folder(folder)
    texts = AdapterTexts(tokenizer)
    names = options.served_model_name or (folder.name,)
    # Nothing before this may use a device: the backend would start with a smaller pool.
    platform = "gpu" if start_backend(options.gpu_memory_utilization) == "gpu" else "cpu"
    mesh, layout = make_mesh(options.mesh), Layout(cfg, options.mesh)
    dtype = _dtype(options.dtype, cfg.dtype, platform)
    copy_head = platform == "cpu"
    load = partial(_weights, options, folder, layout, mesh, dtype, copy_head=copy_head, tell=tell)
    # A GPU's compiler times kernels, and what is left of its memory is measured: weights first.
    model = load() if platform == "gpu" else None

    # XLA multiplies padding pages, too.
    fused = cfg.experts is None and dtype.itemsize == 2 and held.support == LEVELS["plain"]
    free_padding = fused and is_hopper("lora_matmul")
    config = _engine_config(options, cfg, _PLATFORMS[platform], free_padding)
    lora_pages = _lora_pages(options, layout, dtype, config.rank_page, held)
    rank_pages = RankPages(
        cfg, layout, mesh, lora_pages, dtype, config.rank_page, held.support, held.targets
    )
    kv_page = _kv_page_bytes(layout, config, dtype)
    temporaries = _temporaries(layout, config, dtype)
    num_pages = _kv_pages(options, config, kv_page, temporaries, platform)
    config.check_num_pages(num_pages)
    abstract = abstract_decoder(layout, dtype, copy_head=copy_head)
    runner = Runner(
        abstract, layout, mesh, rank_pages, config, num_pages, programs_folder=programs_folder
    )
    shapes = buckets(config)

    base = BaseWeights(folder, base_cfg) if options.load_format != "dummy" else None

    def stage(adapter: Adapter) -> StagedAdapter:
        staged = rank_pages.stage(adapter)
        if not (own := Path(adapter.path)).is_dir():  # a mix
            return staged
        text = texts.read(own, cfg.vocab + adapter.added_tokens)
        return replace(staged, tokenizer=text.tokenizer, eos_ids=text.eos_ids)

    store = AdapterStore(
        read=lambda path: read_adapter(path, base_cfg, base),
        stage=stage,
        upload=rank_pages.upload,
        num_pages=lora_pages,
        max_adapter_pages=config.max_rank_pages,
        max_cpu_loras=options.max_cpu_loras,
        host_bytes=parse_bytes(options.lora_host_memory, "lora_host_memory"),
        reserved=names,
        page_bytes=rank_pages.bytes_per_page * options.mesh,
    )
    engine = Engine(
        runner,
        config,
        store,
        shapes,
        num_pages=num_pages,
        eos_ids=cfg.eos_ids,
        vocab=cfg.vocab,
    )
    store.on_change = engine.wake
    with runner.compiling(shapes, lambda done, total: tell("compiling steps", done, total)):
        # First: a bad path is told at once.
        entries = store.load_all([(one.name, one.path, one.pinned) for one in adapters])
        runner.programs.load(model if model is not None else load())
    runner.warm_up()
    _place(entries, store, rank_pages)
    in_place = InPlace(engine, runner.programs, layout, rank_pages, store)
    if options.merge is not None:
        entry = store.resolve(options.merge, names)
        if entry is None:
            raise ParameterError(f"--merge {options.merge} names the base model", "merge")
        in_place.merge(entry)
    engine.start()
    return Parts(
        engine=engine,
        store=store,
        tokenizer=tokenizer,
        names=names,
        path=str(folder),
        vocab=cfg.vocab,
        in_place=in_place,
        plan=MemoryPlan(
            weights=runner.weight_bytes // options.mesh,
            adapter_pages=rank_pages.nbytes,
            adapter_page_count=lora_pages,
            adapter_page_rows=config.rank_page,
            adapter_projections=tuple(
                part for group in GROUPS if group in held.targets for part in GROUPS[group]
            ),
            adapter_copies=_copy_pages(runner, shapes) * rank_pages.bytes_per_page,
            kv_pages=runner.kv_bytes // options.mesh,
            kv_page_count=num_pages,
            kv_tokens=(num_pages - 1) * config.page_size,
        ),
    )


def persist_programs() -> Path | None:
    """Keeps compiled programs between runs: the engine's in JLORA_CACHE/programs, which is returned,
    all others in JLORA_CACHE/xla."""
    xla, programs = cache_folder() / "xla", cache_folder() / "programs"
    try:
        for folder in (xla, programs):  # what lies there is run: nobody else may write
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:  # a read-only home: every start compiles, nothing else is lost
        log.warning("compiled programs are not kept: %s; set JLORA_CACHE", error)
        return None
    jax.config.update("jax_compilation_cache_dir", os.fspath(xla))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return programs


def _dtype(asked: str, stored: str, platform: str) -> np.dtype:
    """auto is the checkpoint's type on a GPU; on a CPU float32, which XLA multiplies faster."""
    if asked == "auto":
        asked = "float32" if platform == "cpu" else stored
    return np.dtype(jnp.dtype(asked))


def _weights(
    options: ModelOptions,
    folder: Path,
    layout: Layout,
    mesh: jax.sharding.Mesh,
    dtype: np.dtype,
    *,
    copy_head: bool,
    tell: Progress,
) -> Decoder:
    if options.load_format == "dummy":
        return dummy_weights(layout, mesh, dtype, options.seed, copy_head=copy_head)
    return load_weights(
        folder,
        layout,
        mesh,
        dtype,
        copy_head=copy_head,
        progress=lambda _, done, total: tell("loading weights", done, total),
    )


def _engine_config(
    options: ModelOptions, cfg: ModelConfig, platform: _Platform, free_padding: bool
) -> EngineConfig:
    rows = most = options.max_num_seqs or platform.max_num_seqs
    if platform.whole_blocks:
        most = _up(rows, 8 if rows <= 64 else ROW_BLOCKS[0])
    prefill = _prefill_buckets(platform, rows, options.max_num_batched_tokens)
    return EngineConfig(
        max_model_len=options.max_model_len or cfg.default_context,
        max_num_seqs=rows,
        decode_buckets=(*(n for n in platform.decode_buckets if n < most), most),
        prefill_buckets=prefill,
        max_num_batched_tokens=prefill[-1][1],
        max_loras=options.max_loras,
        prefill_block=platform.prefill_block,
        rank_page=platform.rank_page,
        free_padding=free_padding,
        enable_prefix_caching=options.enable_prefix_caching,
        max_logprobs=min(options.max_logprobs, cfg.vocab),
        seed=options.seed,
    )


def _prefill_buckets(
    platform: _Platform, rows: int, tokens: int | None
) -> tuple[tuple[int, int], ...]:
    """(decode rows, prompt tokens) of steps with prompts; the last is the largest."""
    block, most = platform.prefill_block, tokens or platform.max_num_batched_tokens
    if not platform.whole_blocks:
        most = _up(most, block)
        small = {(min(d, rows), min(max(t, block), most)) for d, t in platform.prefill_buckets}
        return (*sorted(small - {(rows, most)}), (rows, most))

    def row_block(total: int) -> int:
        return ROW_BLOCKS[total > ROW_BLOCKS[0]]

    def whole(decode: int, total: int) -> tuple[int, int]:
        total = max(total, decode + block)
        return decode, _up(total, row_block(total)) - decode

    whole_most = most // row_block(most) * row_block(most)
    largest = whole(_up(rows, block), max(whole_most, rows + most // 2))
    small = [(_up(min(d, rows), block), t) for d, t in platform.prefill_buckets]
    pairs = {whole(decode, decode + t) for decode, t in small}
    return (*sorted(pair for pair in pairs if pair[1] < largest[1]), largest)


def _up(count: int, multiple: int) -> int:
    """count, rounded up."""
    return -(-count // multiple) * multiple


def _lora_pages(
    options: ModelOptions, layout: Layout, dtype: np.dtype, rows: int, held: Needs
) -> int:
    """Rank pages that the adapter budget buys on each device."""
    pages = parse_pages(options.lora_memory, "lora_memory")
    if pages is not None:
        return pages
    budget = parse_bytes(options.lora_memory, "lora_memory")
    if budget is None:
        rank = EXPERTS_RANK if "experts" in held.support else LORA_RANK
        return options.max_loras * -(-rank // rows)
    each = page_bytes(layout, dtype, rows, held.support, held.targets)
    if budget < each:
        raise ParameterError(
            f"--lora-memory {options.lora_memory} is less than one rank page of {each} bytes "
            f"({rows} ranks of all projections that adapters may change)",
            "lora_memory",
        )
    return budget // each


def _copy_pages(runner: Runner, shapes: Sequence[Shape]) -> int:
    """Rank pages that the runner's copies of active pages may hold: one set for each size."""
    return sum({shape.rank_pages for shape in shapes}) if runner.programs.copy_pages else 0


def _kv_page_bytes(layout: Layout, config: EngineConfig, dtype: np.dtype) -> int:
    """Bytes of one K/V page over all devices."""
    cfg = layout.cfg
    token = 2 * cfg.layers * layout.kv_heads * cfg.head_dim * dtype.itemsize
    return token * config.page_size


def _temporaries(layout: Layout, config: EngineConfig, dtype: np.dtype) -> int:
    """Bytes on a device that a start or a step may take beside weights, pages and K/V.

    A start went 1.2 GB beyond the plan with a head of 1.05 GB (experiments/008_memory): most likely
    XLA timed the head's product on a copy. A sampler that does all it can holds seven arrays as large
    as its scores (XLA's own figure, on a CPU), and the slots' counts are one more.
    """
    head = layout.cfg.embed * dtype.itemsize // layout.tp
    return layout.cfg.vocab_rows * (head + 8 * config.max_num_seqs * 4)


def _kv_pages(
    options: ModelOptions, config: EngineConfig, page: int, temporaries: int, platform: str
) -> int:
    """K/V pages that the memory buys, the trash page included."""
    useful = config.max_num_seqs * -(-config.max_model_len // config.page_size) + 1
    budget = parse_bytes(options.kv_cache_memory, "kv_cache_memory")
    if budget is None and platform == "cpu":
        budget = CPU_KV_BYTES
    elif budget is None:
        share, devices = options.gpu_memory_utilization, jax.devices()[: options.mesh]
        memories = [device_memory(device) for device in devices]
        least = min(memories, key=lambda memory: memory.pool)
        if least.pool < int(least.card * share):
            log.warning(
                "jax can have %.1f of a device's %.1f GB, less than --gpu-memory-utilization %g: its "
                "pool is at most %g of it, and less if jax ran already, if others use the device, "
                "or if the environment says so",
                least.pool / 1e9,
                least.card / 1e9,
                share,
                LARGEST_POOL,
            )
        room = min(memory.room(share, temporaries) for memory in memories)
        budget = max(0, room) * len(devices)
    return min(useful, budget // page)


def _place(entries: Sequence[AdapterEntry], store: AdapterStore, rank_pages: RankPages) -> None:
    """The adapters of the start on the device, while there is room: the first requests need not wait."""
    placed: list[AdapterEntry] = []
    for entry in entries:
        placement = store.place(entry, placed)
        if placement is not None:
            rank_pages.write(placement.staged, placement.pages)
            placed.append(entry)
