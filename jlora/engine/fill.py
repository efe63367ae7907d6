"""Writes a plan's chunks into a step's arrays: host logic in numpy, for all decode rows at once."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

import numpy as np

from jlora.engine.scheduler import Chunk, Plan
from jlora.engine.sequence import Sequence
from jlora.shape import Shape

Row = tuple[int, Chunk]
"""A row of the step that samples, and its chunk."""


class Tables:
    """K/V page tables of the running sequences by slot, kept from step to step: a decode row needs
    another entry once in `page_size` steps."""

    def __init__(self, slots: int, width: int):
        self._rows = np.zeros((slots, width), np.int32)
        self._states: list[tuple[Sequence | None, int, int]] = [(None, 0, 0)] * slots

    def of(self, seqs: Seq[Sequence], slots: Seq[int]) -> np.ndarray:
        """[sequences, width]; unused entries are page 0."""
        for seq, slot in zip(seqs, slots, strict=True):
            held, stay, count = self._states[slot]
            if count != len(seq.pages) or held is not seq or stay != seq.preemptions:
                count = len(seq.pages)
                self._rows[slot, :count] = seq.pages
                self._rows[slot, count:] = 0
                self._states[slot] = (seq, seq.preemptions, count)
        return self._rows[slots]


def fill(plan: Plan, shape: Shape, arrays: dict[str, np.ndarray], tables: Tables) -> list[Row]:
    """Writes all chunks into arrays of padding, rows of an adapter side by side; gives the rows that
    sample."""
    number = numbers(plan)
    return [
        *_fill_decodes(sorted(plan.decodes, key=number), number, arrays, tables),
        *_fill_prefills(plan, shape, number, arrays),
    ]


def numbers(plan: Plan) -> Callable[[Chunk], int]:
    """Batch-local adapter number of a chunk; base rows come last."""
    found = {id(adapter): number for number, adapter in enumerate(plan.adapters)}
    return lambda chunk: found.get(id(chunk.seq.adapter), len(found))


def prefill_rows(
    plan: Plan, shape: Shape, number: Callable[[Chunk], int]
) -> Iterator[tuple[Chunk, int, int, int]]:
    """(chunk, first token, first row, blocks) of each prefill chunk, sorted by adapter."""
    token = row = shape.decode
    for chunk in sorted(plan.prefills, key=number):
        blocks = -(-chunk.length // shape.block)
        yield chunk, token, row, blocks
        token += blocks * shape.block
        row += blocks


def _fill_decodes(
    chunks: list[Chunk],
    number: Callable[[Chunk], int],
    arrays: dict[str, np.ndarray],
    tables: Tables,
) -> list[Row]:
    """Token r is row r. Decode rows always sample."""
    count = len(chunks)
    if not count:
        return []
    seqs = [chunk.seq for chunk in chunks]
    slots: list[int] = [seq.slot for seq in seqs]  # type: ignore[misc]
    starts = [chunk.start for chunk in chunks]
    arrays["tokens"][:count] = [  # -1: sampled, not read yet
        seq.tokens[start] if start < len(seq.tokens) else -1
        for seq, start in zip(seqs, starts, strict=True)
    ]
    arrays["positions"][:count] = starts
    arrays["slots"][:count] = slots
    arrays["last"][:count] = np.arange(count)
    arrays["samples"][:count] = 1
    arrays["tables"][:count] = tables.of(seqs, slots)
    if arrays["adapter"].size:
        arrays["adapter"][:count] = [
            -1 if chunk.seq.adapter is None else number(chunk) for chunk in chunks
        ]
    return list(enumerate(chunks))


def _fill_prefills(
    plan: Plan, shape: Shape, number: Callable[[Chunk], int], arrays: dict[str, np.ndarray]
) -> list[Row]:
    """A chunk takes whole blocks; the last of them samples."""
    rows: list[Row] = []
    for chunk, token, row, blocks in prefill_rows(plan, shape, number):
        seq, final, here = chunk.seq, row + blocks - 1, slice(token, token + chunk.length)
        arrays["tokens"][here] = seq.tokens[chunk.start : chunk.stop]
        arrays["positions"][here] = np.arange(chunk.start, chunk.stop)
        arrays["tables"][row : row + blocks, : len(seq.pages)] = seq.pages
        arrays["slots"][final] = seq.slot
        arrays["last"][final] = token + chunk.length - 1
        arrays["samples"][final] = chunk.samples
        if seq.adapter is not None:
            arrays["adapter"][here] = number(chunk)
        if chunk.samples:
            rows.append((final, chunk))
    return rows
