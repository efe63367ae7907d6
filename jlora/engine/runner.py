"""Runs steps on the device: owns weights, K/V pools and slots, and every compiled program.

`dispatch(plan)` builds one packed batch in numpy and queues the step; `collect` waits for its
tokens. All programs are compiled by `compiling`; a step whose shape was not compiled is an error,
so nothing ever compiles while requests wait.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jlora.adapters.pool import RankPages
from jlora.batch import empty
from jlora.device_memory import small_blocks
from jlora.engine import sampler
from jlora.engine.config import EngineConfig
from jlora.engine.fill import Row, Tables, fill, numbers, prefill_rows
from jlora.engine.params import SamplingParams
from jlora.engine.programs import SCORE_ROWS, Programs
from jlora.engine.sampler import Kind
from jlora.engine.scheduler import Chunk, Plan
from jlora.engine.sequence import Sequence, TokenLogprobs
from jlora.engine.steps import KV_AXES
from jlora.models.decoder import Decoder
from jlora.shape import Shape
from jlora.sharding import Layout, sharding

log = logging.getLogger(__name__)

COUNT_TOKENS = 256
"""Tokens that one call adds to a slot's counts."""


Scored = tuple[Chunk, list[tuple[int, sampler.Sampled]]]
"""A prompt chunk and its scoring calls: how many targets, what they got."""


@dataclass
class Pending:
    """A step that is queued on the device."""

    plan: Plan
    rows: list[Row]
    """Of every chunk that samples."""
    sampled: sampler.Sampled
    scored: list[Scored]
    """Prompt chunks whose log-probabilities were asked for."""


@dataclass
class Result:
    """What a step gave, on the host."""

    tokens: dict[str, int] = field(default_factory=dict)
    """Sampled token by request id."""
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[str, tuple[int, list[TokenLogprobs]]] = field(default_factory=dict)
    """(position of the first, entries) by request id."""


class Runner:
    """The device side of an engine. One thread owns it."""

    def __init__(
        self,
        abstract: Decoder,
        layout: Layout,
        mesh: Mesh,
        rank_pages: RankPages,
        config: EngineConfig,
        num_pages: int,
        *,
        programs_folder: Path | None = None,
    ):
        """Allocates K/V pools of `num_pages` pages and the slots; compiles nothing yet. Of the
        model it takes the shapes: its weights go to `programs.load`. Compiled programs are kept in
        `programs_folder`."""
        cfg = layout.cfg
        self.config, self.rank_pages, self.vocab = config, rank_pages, cfg.vocab_rows
        self._on_cpu = on_cpu = mesh.devices.flat[0].platform == "cpu"
        self.programs = Programs(
            abstract,
            layout,
            mesh,
            config.max_logprobs,
            copy_pages=on_cpu,
            split=on_cpu,
            # A branch costs a CPU nothing; it makes a GPU wait for the host.
            kinds=(Kind.ANY,) if on_cpu else tuple(Kind),
            folder=programs_folder,
        )
        dtype = self.programs.dtype
        page = (num_pages, layout.kv_heads, config.page_size, cfg.head_dim)
        zeros = jax.jit(
            lambda: [(jnp.zeros(page, dtype), jnp.zeros(page, dtype)) for _ in range(cfg.layers)],
            out_shardings=sharding(mesh, *KV_AXES),
        )
        self.kv: list[tuple[jax.Array, jax.Array]] = zeros()
        slots = jax.jit(
            lambda: sampler.empty_slots(config.max_num_seqs, cfg.vocab_rows),
            out_shardings=sharding(mesh),
        )
        self.slots: sampler.Slots = slots()
        # Of the sequences by slot: which stay there it is, and what they ask of the sampler.
        self._stays: dict[int, tuple[int, int]] = {}
        self._kinds = [Kind.GREEDY] * config.max_num_seqs
        self._tables = Tables(config.max_num_seqs, -(-config.max_model_len // config.page_size))
        replicated = {"out_shardings": sharding(mesh), "donate_argnums": 0}
        self._write_slot = jax.jit(sampler.write_slot, **replicated)
        self._count = jax.jit(sampler.count_tokens, **replicated)
        # Collectives between CPU devices can deadlock if steps are queued behind each other.
        self.in_order = on_cpu and mesh.size > 1
        # By rank pages of a shape: the pages that were copied out last, and their copies.
        self._copied: dict[int, tuple[list[int], Any]] = {}
        self._first_runs: list[Shape] = []
        self._small_blocks: list[jax.Array] = []

    @property
    def kv_bytes(self) -> int:
        """Bytes of all K/V pages over all devices."""
        return sum(array.nbytes for pair in self.kv for array in pair)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights over all devices."""
        return sum(leaf.nbytes for leaf in self.programs.weights)

    @property
    def compiled_shapes(self) -> int:
        """Step shapes that are compiled."""
        return len(self.programs)

    # ---- compiling ------------------------------------------------------------------------

    @contextmanager
    def compiling(
        self, shapes: Seq[Shape], progress: Callable[[int, int], None] | None = None
    ) -> Iterator[None]:
        """Compiles every program that serving can need while the body runs; an error there ends it."""
        failed = threading.Event()

        def tell(done: int, total: int) -> None:
            if failed.is_set():
                raise CancelledError
            if progress is not None:
                progress(done, total)

        arrays = (self.rank_pages.pools, self.kv, self.slots)
        with ThreadPoolExecutor(1) as thread:
            compiled = thread.submit(self.programs.compile_all, shapes, *arrays, tell)
            try:
                yield
                compiled.result()
            except BaseException:
                failed.set()
                raise
        self._first_runs = list(shapes)

    def warm_up(self) -> None:
        """Runs every program once, on a CPU the first only, and prepares the slots."""
        if not self._on_cpu:
            most = 4 * max(shape.words for shape in self._first_runs)
            for device in self.programs.mesh.devices.flat:
                self._small_blocks += small_blocks(device, most)
        self.rank_pages.warm_up()
        # A first run costs a second: a GPU captures its graph in it, XLA:CPU prepares its matmuls.
        # On a CPU that is as much as compiling (from the cache) took, so only one runs now.
        for _ in self._first_runs[:1] if self._on_cpu else self._first_runs[:]:
            self.first_run()
        # Greedy: one padding row that draws would make every padded step draw for all its rows.
        row = sampler.slot_row(
            SamplingParams(temperature=0.0), prompt_length=0, seed=0, stop_ids=(), vocab=self.vocab
        )
        trash = np.int32(self.config.max_num_seqs)
        self.slots = self._write_slot(self.slots, trash, row)
        nothing = np.full(COUNT_TOKENS, self.vocab, np.int32)
        self.slots = self._count(self.slots, trash, nothing, np.zeros(COUNT_TOKENS, bool))
        jax.block_until_ready(self.slots)

    @property
    def settled(self) -> bool:
        """Whether every program has run once: the first run of one takes a second on a CPU."""
        return not self._first_runs

    def first_run(self) -> bool:
        """Runs a step that never ran, on padding; False if there is none. For idle moments: else
        the first request that needs the step waits for it."""
        if not self._first_runs:
            return False
        shape = self._first_runs[0]
        for kind in self.programs.kinds:
            packed, arrays = empty(shape, self.config.max_num_seqs)
            if held := self._copied.get(shape.rank_pages):  # keep the copies that requests use
                arrays["pages"][:] = held[0]
            jax.block_until_ready(self._run(shape, packed, arrays["pages"], kind))
        del self._first_runs[0]
        return True

    # ---- running --------------------------------------------------------------------------

    def _run(
        self, shape: Shape, packed: np.ndarray, pages: np.ndarray, kind: Kind
    ) -> tuple[sampler.Sampled, jax.Array | None]:
        self.kv, scores, rows, hidden = self.programs.step(shape)(
            self.programs.weights,
            self._adapters(shape, pages),
            self.kv,
            self.slots.last,
            packed,
        )
        sampled, self.slots = self.programs.sample(shape.rows, kind)(scores, self.slots, rows)
        return sampled, hidden

    def _adapters(self, shape: Shape, pages: np.ndarray) -> Any:
        """The step's adapters: the pools, or copies of the active pages, made when they change."""
        if not shape.rank_pages:
            return None
        if not self.programs.copy_pages:
            return self.rank_pages.pools
        held = self._copied.get(shape.rank_pages)
        if held is None or held[0] != pages.tolist():
            self._copied.pop(shape.rank_pages, None)  # frees the old copies first
            copies = self.programs.copy(shape.rank_pages)(self.rank_pages.pools, pages)
            held = self._copied[shape.rank_pages] = (pages.tolist(), copies)
        return held[1]

    def _active(self, shape: Shape, rank_pages: Seq[Seq[int]]) -> tuple[list[int], list[int]]:
        """(pages, owners) of a step. Pages that are copied out already stay in their places, those
        that nobody in this step owns too: adapters come and go, and the copies serve on."""
        number = {page: n for n, own in enumerate(rank_pages) for page in own}
        pages = list(number)
        held = self._copied.get(shape.rank_pages)
        if held is not None:
            stay = [page for page in held[0] if page and page not in number]
            pages = held[0] if number.keys() <= set(held[0]) else pages + stay
        pages = pages[: shape.rank_pages]
        return pages, [number.get(page, -1) for page in pages]

    def dispatch(self, plan: Plan, shape: Shape, rank_pages: Seq[Seq[int]]) -> Pending:
        """Queues one step; `rank_pages` are those of each of the plan's adapters.

        Placements of the plan are written to their rank pages before it.
        """
        for placement in plan.placements:
            self.rank_pages.write(placement.staged, placement.pages)
            self._copied.clear()
        for chunk in plan.prefills:  # a sequence that has a slot begins with one
            self._admit(chunk.seq)
        packed, arrays = empty(shape, self.config.max_num_seqs)
        pages, owners = self._active(shape, rank_pages)
        arrays["pages"][: len(pages)], arrays["owner"][: len(pages)] = pages, owners
        rows = fill(plan, shape, arrays, self._tables)
        kind = max((self._kinds[chunk.seq.slot] for _, chunk in rows), default=Kind.GREEDY)  # type: ignore[index]
        sampled, hidden = self._run(shape, packed, arrays["pages"], kind)
        if self.in_order:
            jax.block_until_ready(sampled)
        return Pending(plan, rows, sampled, self._scores(plan, shape, hidden, rank_pages))

    def collect(self, pending: Pending) -> Result:
        """Waits for a step and gives its tokens and the log-probabilities that were asked for."""
        result = Result()
        tokens = np.asarray(pending.sampled.tokens).tolist()
        result.tokens = {chunk.seq.request_id: tokens[row] for row, chunk in pending.rows}
        described = [one for one in pending.rows if one[1].seq.params.logprobs is not None]
        host = _on_host(pending.sampled) if described else pending.sampled
        for row, chunk in described:
            seq = chunk.seq
            result.logprobs[seq.request_id] = _logprobs(host, row, seq.params.logprobs or 0)
        for chunk, calls in pending.scored:
            seq = chunk.seq
            wanted = seq.params.prompt_logprobs or 0
            entries: list[TokenLogprobs] = []
            result.prompt_logprobs[seq.request_id] = (chunk.start + 1, entries)
            for count, sampled in calls:
                host = _on_host(sampled)
                entries += [_logprobs(host, row, wanted) for row in range(count)]
        return result

    def _admit(self, seq: Sequence) -> None:
        """Writes what a sequence asks of the sampler when it gets its slot (again)."""
        assert seq.slot is not None
        stay = (seq.order, seq.preemptions)
        if self._stays.get(seq.slot) == stay:
            return
        self._stays[seq.slot] = stay
        params = seq.params
        self._kinds[seq.slot] = sampler.kind(params)
        row = sampler.slot_row(
            params,
            prompt_length=len(seq.prompt),
            seed=seq.seed,
            stop_ids=(*seq.eos_ids, *params.stop_token_ids),
            vocab=self.vocab,
        )
        self.slots = self._write_slot(self.slots, np.int32(seq.slot), row)
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
            for start in range(0, len(seq.tokens), COUNT_TOKENS):
                part = seq.tokens[start : start + COUNT_TOKENS]
                tokens = np.full(COUNT_TOKENS, self.vocab, np.int32)
                tokens[: len(part)] = part
                prompt = start + np.arange(COUNT_TOKENS) < len(seq.prompt)
                self.slots = self._count(self.slots, np.int32(seq.slot), tokens, prompt)

    def _scores(
        self,
        plan: Plan,
        shape: Shape,
        hidden: jax.Array | None,
        rank_pages: Seq[Seq[int]],
    ) -> list[Scored]:
        """Queues the scoring of prompt chunks whose log-probabilities were asked for."""
        scored: list[Scored] = []
        number = numbers(plan)
        for chunk, token, _, _ in prefill_rows(plan, shape, number):
            if chunk.seq.params.prompt_logprobs is None:
                continue
            # position p predicts token p + 1; the last prompt position predicts the output
            targets = chunk.seq.prompt[chunk.start + 1 : chunk.stop + 1]
            calls = []
            pools, pages = None, np.zeros(0, np.int32)
            if "vocabulary" in self.rank_pages.support:  # the head may be an adapter's own
                pools = self.rank_pages.pools
                pages = np.zeros(self.config.max_rank_pages, np.int32)
                if chunk.seq.adapter is not None:
                    own = rank_pages[number(chunk)]
                    pages[: len(own)] = own
            for start in range(0, len(targets), SCORE_ROWS):
                part = targets[start : start + SCORE_ROWS]
                rows, padded = np.full(SCORE_ROWS, token, np.int32), np.zeros(SCORE_ROWS, np.int32)
                rows[: len(part)] = token + start + np.arange(len(part))
                padded[: len(part)] = part
                sampled = self.programs.score(shape.tokens)(
                    self.programs.weights, pools, hidden, rows, padded, pages
                )
                calls.append((len(part), sampled))
            scored.append((chunk, calls))
        if self.in_order:
            jax.block_until_ready([sampled for _, calls in scored for _, sampled in calls])
        return scored


def _on_host(sampled: sampler.Sampled) -> sampler.Sampled:
    return jax.tree.map(np.asarray, sampled)


def _logprobs(sampled: sampler.Sampled, row: int, wanted: int) -> TokenLogprobs:
    top = zip(sampled.top_ids[row, :wanted], sampled.top_logprobs[row, :wanted], strict=True)
    return TokenLogprobs(
        token=int(sampled.tokens[row]),
        logprob=float(sampled.logprobs[row]),
        rank=int(sampled.ranks[row]),
        top={int(token): float(value) for token, value in top},
    )
