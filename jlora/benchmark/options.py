"""What a user can choose for a benchmark: a model's options, and the load."""

from collections.abc import Sequence
from dataclasses import dataclass

from jlora.benchmark.load import Workload
from jlora.benchmark.rounds import CASES, Schedule, models_of
from jlora.errors import ParameterError
from jlora.options import ModelOptions

HTTP_VOCAB = 32000
"""Prompt tokens against a server, which does not tell its vocabulary: most models have these."""


def split(values: Sequence[str]) -> list[str]:
    """Lists may be written with commas or spaces."""
    return [part for value in values for part in value.split(",") if part]


@dataclass(frozen=True, kw_only=True)
class BenchOptions(ModelOptions):
    """A closed loop of random prompts over a model in this process or a server."""

    base_url: str | None = None
    """Server to load, e.g. http://127.0.0.1:8000. Without it, the model runs in this process."""

    models: tuple[str, ...] = ()
    """With --base-url: names of the base model and of the adapters, e.g. base,a0,a1."""

    concurrency: tuple[int, ...] = (1, 8, 32)
    """Requests in flight; one or several values."""

    num_prompts: int | None = None
    """Requests of each measurement. Default: two for each client, at least six."""

    random_input_len: int = 64
    """Tokens of a prompt."""

    random_output_len: int = 64
    """Tokens to generate."""

    cases: tuple[str, ...] = ()
    """Of base, one (the first adapter), mixed (all adapters in turn). Default: all that there are models for."""

    repeats: int = 3
    """Rounds over all cases; medians are reported."""

    random_adapters: int = 0
    """Adapters of random weights to make and load (in process only)."""

    ranks: tuple[str, ...] = ("8,16,32,8",)
    """Their ranks, repeated as needed."""

    vocab_size: int | None = None
    """Prompt tokens are below this id. Default: the model's vocabulary; 32000 with --base-url."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("random_input_len", "random_output_len", "repeats", "num_prompts"):
            self._at_least(name, getattr(self, name), 1)
        self._at_least("vocab_size", self.vocab_size, 2)
        self._at_least("random_adapters", self.random_adapters, 0)
        for value in self.concurrency:
            self._at_least("concurrency", value, 1)
        if not self.concurrency or len(set(self.concurrency)) < len(self.concurrency):
            raise ParameterError("concurrency needs one or several different values", "concurrency")
        if wrong := [case for case in self.wanted if case not in CASES]:
            raise ParameterError(f"cases: {wrong[0]!r} is not one of {', '.join(CASES)}", "cases")
        if wrong := [rank for rank in split(self.ranks) if not rank.isdecimal() or int(rank) < 1]:
            raise ParameterError(f"ranks must be positive integers, got {wrong[0]!r}", "ranks")
        if not split(self.ranks):
            raise ParameterError("ranks needs at least one value", "ranks")
        if bool(self.base_url) != bool(self.models):
            raise ParameterError("base_url and models go together: one is missing", "models")
        if self.base_url and (self.model or self.lora_modules or self.random_adapters):
            raise ParameterError(
                "base_url: a server brings its own model; leave out --model, --lora-modules and "
                "--random-adapters",
                "base_url",
            )

    @property
    def wanted(self) -> list[str]:
        """`cases`, split."""
        return split(self.cases)

    @property
    def adapter_ranks(self) -> list[int]:
        """A rank for each random adapter."""
        ranks = [int(rank) for rank in split(self.ranks)]
        return [ranks[i % len(ranks)] for i in range(self.random_adapters)]

    def schedule(self, names: Sequence[str]) -> Schedule:
        """What to measure with a base model and adapters of these names."""
        there = models_of(names)
        if missing := [case for case in self.wanted if case not in there]:
            raise ParameterError(
                f"cases: {missing[0]!r} needs an adapter, there is only the base model {names[0]!r}",
                "cases",
            )
        return Schedule(
            cases={case: there[case] for case in CASES if case in (self.wanted or there)},
            concurrency=self.concurrency,
            num_prompts=self.num_prompts,
            repeats=self.repeats,
        )

    def workload(self, vocab: int) -> Workload:
        """The requests for a model of `vocab` tokens."""
        if self.vocab_size is not None and self.vocab_size > vocab and not self.base_url:
            raise ParameterError(
                f"vocab_size {self.vocab_size} is more than the model's {vocab}", "vocab_size"
            )
        return Workload(
            input_len=self.random_input_len,
            output_len=self.random_output_len,
            vocab=self.vocab_size or vocab,
            seed=self.seed,
        )

    def _at_least(self, name: str, value: int | None, least: int) -> None:
        if value is not None and value < least:
            raise ParameterError(f"{name} must be at least {least}, got {value}", name)
