"""The engine's limits and the step shapes that are compiled from them.

A step has some decode rows, some prefill tokens and some active rank pages; it is padded to the
smallest compiled shape that holds it, so the lists here trade compile time against padding.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jlora.engine.params import SamplingParams
from jlora.errors import ParameterError
from jlora.shape import Shape

RANK_ROWS = (16, 64, 128, 512)
"""Rank rows of all adapters of a step together, by default: doublings follow."""

LARGE_STEP, LARGE_RANKS = 65, 2048
"""Tokens of a step, and rank rows: where padding pages cost nothing, steps of at least so many tokens
(the launch for many rows) and at most so many ranks are one shape. More ranks take more memory."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What one engine may hold and compute at once. A wrong value is a `ParameterError`."""

    max_model_len: int
    """Tokens of a sequence at most, prompt and output together."""
    max_num_seqs: int = 32
    """Running sequences at most: slots of device state, and decode rows of a step."""
    max_num_batched_tokens: int = 256
    """Prefill tokens of a step at most, padding to `prefill_block` included."""
    page_size: int = 16
    """Tokens of a KV page."""
    num_pages: int | None = None
    """KV pages, the trash page 0 included; None: whoever builds the engine measures the memory."""
    rank_page: int = 16
    """Rank rows of one rank page (see jlora/README.md)."""
    max_loras: int = 8
    """Different adapters in one step at most; the base model does not count."""
    prefill_block: int = 16
    """Each prefill chunk is padded to a multiple of this many tokens."""
    enable_prefix_caching: bool = True
    """Keep the KV pages of finished prompts and reuse them for equal prefixes."""
    max_logprobs: int = 20
    """Likeliest tokens that a request may ask for at each position."""
    max_adapter_wait: int = 64
    """Steps that a request waits for room for its adapter before room is made (see room.py)."""
    seed: int = 0
    """Seeds the draws of requests that bring no seed of their own."""
    decode_buckets: tuple[int, ...] = ()
    """Decode rows of the steps without prefill; empty: 1, 8, 32 and doublings up to the maximum. Rows
    beyond `max_num_seqs` are padding, here and below."""
    prefill_buckets: tuple[tuple[int, int], ...] = ()
    """(decode rows, prefill tokens) of the steps with prefill; empty: about (8, 64), and the maximum."""
    rank_page_buckets: tuple[int, ...] = ()
    """Active rank pages of the steps with LoRA (each shape also has a variant without); empty:
    RANK_ROWS up to 64 ranks for each of max_loras. The largest one bounds an adapter's rank."""
    free_padding: bool = False
    """Rank pages that are not active take no time, as in the Hopper launches: then fewer shapes differ
    in nothing but room for pages. A program with LoRA costs a cold start up to ten seconds there."""

    def __post_init__(self) -> None:
        for name in [
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "page_size",
            "rank_page",
            "max_loras",
            "prefill_block",
        ]:
            _at_least(name, getattr(self, name), 1)
        for name in ["max_logprobs", "max_adapter_wait"]:
            _at_least(name, getattr(self, name), 0)
        if self.max_num_batched_tokens % self.prefill_block:
            raise ParameterError(
                f"max_num_batched_tokens must be a multiple of prefill_block={self.prefill_block}, "
                f"got {self.max_num_batched_tokens}",
                param="max_num_batched_tokens",
            )
        if self.num_pages is not None:
            self.check_num_pages(self.num_pages)
        self._fill_buckets()

    @property
    def max_rank_pages(self) -> int:
        """Rank pages of all adapters of one step together."""
        return max(self.rank_page_buckets)

    @property
    def max_rank(self) -> int:
        """The largest adapter rank that a step can hold."""
        return self.max_rank_pages * self.rank_page

    def check_num_pages(self, num_pages: int) -> None:
        """Raise unless one sequence of `max_model_len` tokens fits beside the trash page."""
        least = -(-self.max_model_len // self.page_size) + 1
        if num_pages < least:
            raise ParameterError(
                f"{num_pages} KV pages of {self.page_size} tokens can't hold one sequence of "
                f"max_model_len={self.max_model_len}; {least} are needed: lower --max-model-len",
                param="max_model_len",
            )

    def check_request(self, prompt_tokens: int, params: SamplingParams) -> None:
        """Raise a `ParameterError` for a request whose size this engine can never serve."""
        if prompt_tokens < 1:
            raise ParameterError("the prompt is empty: at least one token is needed", "prompt")
        if prompt_tokens > self.max_model_len - (0 if params.scores_only else 1):
            raise ParameterError(
                f"the prompt has {prompt_tokens} tokens, but this model's maximum context length is "
                f"{self.max_model_len} tokens (prompt and output together)",
                "prompt",
            )
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, name)
            if wanted is not None and wanted > self.max_logprobs:
                raise ParameterError(
                    f"{name}={wanted} is more than this server's max_logprobs={self.max_logprobs}",
                    name,
                )

    def _fill_buckets(self) -> None:
        """Put the defaults in, sort, and see that the largest possible step fits one."""
        rows, tokens = self.max_num_seqs, self.max_num_batched_tokens
        decode = self.decode_buckets or _default_decode(rows)
        prefill = self.prefill_buckets or self._default_prefill()
        ranks = self.rank_page_buckets or self._default_ranks()
        for name, value in (
            ("decode_buckets", tuple(sorted(set(decode)))),
            ("prefill_buckets", tuple(sorted({(rows, tokens) for rows, tokens in prefill}))),
            ("rank_page_buckets", tuple(sorted(set(ranks)))),
        ):
            object.__setattr__(self, name, value)
        if self.decode_buckets[-1] < rows or self.decode_buckets[0] < 1:
            raise ParameterError(
                f"decode_buckets must be positive and reach max_num_seqs={rows}, "
                f"got {self.decode_buckets}",
                param="decode_buckets",
            )
        largest = any(d >= rows and t == tokens for d, t in self.prefill_buckets)
        if not largest or any(
            d < 0 or t < 1 or t > tokens or t % self.prefill_block for d, t in self.prefill_buckets
        ):
            raise ParameterError(
                f"prefill_buckets must hold ({rows}, {tokens}) as the largest pair, or one of more "
                f"rows, and multiples of prefill_block={self.prefill_block}, "
                f"got {self.prefill_buckets}",
                param="prefill_buckets",
            )
        if self.rank_page_buckets[0] < 1:
            raise ParameterError(
                f"rank_page_buckets must be positive, got {self.rank_page_buckets}",
                param="rank_page_buckets",
            )

    def _default_prefill(self) -> tuple[tuple[int, int], ...]:
        rows, tokens, block = self.max_num_seqs, self.max_num_batched_tokens, self.prefill_block
        return ((min(8, rows), min(max(64 // block, 1) * block, tokens)), (rows, tokens))

    def _default_ranks(self) -> tuple[int, ...]:
        most = 64 * self.max_loras
        # The launches take pages by eight: in one with room for four they cost what they cost in eight.
        rows: list[int] = [n for n in RANK_ROWS if n != 64 or not self.free_padding]
        while rows[-1] < most:
            rows.append(rows[-1] * 2)
        return tuple(-(-n // self.rank_page) for n in (*(n for n in rows if n < most), most))


def buckets(config: EngineConfig) -> list[Shape]:
    """Every shape to compile: each bucket of rows and tokens, without and with LoRA.

    Few rows have few adapters, so a small step comes with few rank pages only: a step with few
    rows and many pages (one adapter of a high rank) is padded to more rows. Where all sequences may
    decode, all their pages fit. A large step comes with 64 rank rows at least: padding pages cost it
    little, a program costs a start half a second.
    """
    sizes = [(rows, 0) for rows in config.decode_buckets] + list(config.prefill_buckets)
    shapes = []
    for decode, prefill in sizes:
        rows = decode + prefill // config.prefill_block
        most = max(64, 24 * rows) // config.rank_page
        least = min(64, (decode + prefill) * 3 // 4) // config.rank_page
        ranks = {r for r in config.rank_page_buckets if least <= r <= most}
        if decode >= config.max_num_seqs or not ranks:
            ranks.add(config.max_rank_pages)
        if config.free_padding and decode + prefill >= LARGE_STEP:
            alike = [pages for pages in ranks if pages * config.rank_page <= LARGE_RANKS]
            ranks -= set(sorted(alike)[:-1])
        shapes += [
            Shape(
                decode=decode,
                prefill=prefill,
                rank_pages=pages,
                block=config.prefill_block,
                table=-(-config.max_model_len // config.page_size),
            )
            for pages in (0, *sorted(ranks))
        ]
    return shapes


def check_tokens(vocab: int, prompt: Sequence[int], params: SamplingParams) -> None:
    """Raise a `ParameterError` for a request that names tokens which the model does not have."""
    for name, tokens in (
        ("prompt", prompt),
        ("logit_bias", params.logit_bias or ()),
        ("stop_token_ids", params.stop_token_ids),
    ):
        if tokens and (min(tokens) < 0 or max(tokens) >= vocab):
            bad = next(token for token in tokens if not 0 <= token < vocab)
            raise ParameterError(
                f"{name}: token id {bad} is outside the vocabulary of {vocab}", name
            )


def pick(
    shapes: Iterable[Shape], n_decode: int, n_prefill_tokens_padded: int, n_pages: int
) -> Shape:
    """The smallest shape that holds the step: fewest token rows, then fewest rank pages."""
    fitting = [
        shape
        for shape in shapes
        if shape.decode >= n_decode
        and shape.prefill >= n_prefill_tokens_padded
        and shape.rank_pages >= n_pages
    ]
    assert fitting, f"no compiled shape holds {n_decode=} {n_prefill_tokens_padded=} {n_pages=}"
    return min(fitting, key=lambda s: (s.decode + s.prefill, s.rank_pages, s.prefill))


def _default_decode(rows: int) -> tuple[int, ...]:
    sizes = [1, 8, 32]
    while sizes[-1] * 2 < rows:
        sizes.append(sizes[-1] * 2)
    return (*(size for size in sizes if size < rows), rows)


def _at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ParameterError(
            f"{name} must be an integer of at least {least}, got {value!r}", param=name
        )
