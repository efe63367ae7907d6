"""What a user can choose for a benchmark: a model's options, the systems to compare, and the load."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from jlora.benchmark.lengths import read_lengths
from jlora.benchmark.rounds import Case, Schedule, System
from jlora.benchmark.shapes import shape_config
from jlora.benchmark.workload import Popularity, Workload
from jlora.errors import ParameterError
from jlora.models.config import PROJECTIONS
from jlora.options import ModelOptions

HTTP_VOCAB = 32000
"""Prompt tokens against a server, which does not tell its vocabulary: most models have these."""


def split(values: Sequence[str]) -> list[str]:
    """Lists may be written with commas or spaces."""
    return [part for value in values for part in value.split(",") if part]


@dataclass(frozen=True, kw_only=True)
class BenchOptions(ModelOptions):
    """Random prompts over a model in this process or a server: systems and adapters compared in turns.

    Several --config that agree in an engine's options are measured one after the other in one engine.
    """

    shape: str | None = None
    """Random weights in a named shape instead of --model: tiny, smollm2-135m, llama-3.1-8b and others."""

    base_url: str | None = None
    """Server to load, e.g. http://127.0.0.1:8000; its key is $OPENAI_API_KEY. Without it, the model runs in this process."""

    models: tuple[str, ...] = ()
    """With --base-url: names of the base model and of the adapters, e.g. base,a0,a1."""

    systems: tuple[str, ...] = ("base,unmerged",)
    """Of base, compiled (base, LoRA compiled into its steps), merged (in place, one adapter at a time), unmerged."""

    adapters_n: tuple[int, ...] = field(default=(), metadata={"aliases": ("--adapters",)})
    """Numbers of adapters that merged and unmerged are measured with. Default: one and all, of which there are any."""

    random_adapters: int | None = None
    """Adapters of random weights to make and load, for each of --ranks. Default: as many as --adapters-n needs when no others are given (in process)."""

    ranks: tuple[str, ...] = ("8,16,32,8",)
    """Their ranks, repeated as needed, e.g. 8,16,32,8. Several values are compared with each other."""

    adapter_modules: tuple[str, ...] = PROJECTIONS
    """Projections that random adapters change."""

    room: int | None = None
    """Device memory for this many of the largest adapter; fewer than there are adapters makes churn. Sets --lora-memory."""

    popularity: tuple[str, ...] = ("distinct",)
    """Of identical, distinct (in turn), uniform, zipf, power; several are compared with each other."""

    zipf_s: float = 1.5
    """Exponent of zipf."""

    power_alpha: float = 1.0
    """S-LoRA's alpha of power: 1 is uniform, below it the first adapters are asked for most."""

    arrivals: Literal["closed", "poisson", "gamma"] = "closed"
    """closed: --concurrency clients, each with one request at a time. poisson, gamma: at --rate, whatever runs."""

    rate: tuple[float, ...] = ()
    """Requests per second of poisson and gamma; one or several values."""

    cv: float = 1.0
    """Coefficient of variation of gamma's gaps; 1 is poisson, more is burstier."""

    concurrency: tuple[int, ...] = (1, 8, 32)
    """Requests in flight in a closed loop; one or several values."""

    num_prompts: int | None = None
    """Requests of each measurement. Default: two for each client, at least six; with --duration no limit."""

    duration: float | None = None
    """Seconds in which each measurement sends requests."""

    lengths: Literal["fixed", "uniform", "lognormal", "file"] = "fixed"
    """fixed and lognormal (its medians): --random-input-len, --random-output-len. uniform: --length-range. file: --lengths-file."""

    random_input_len: int = 64
    """Tokens of a prompt."""

    random_output_len: int = 64
    """Tokens to generate."""

    length_range: tuple[int, ...] = (8, 512)
    """Least and most tokens of uniform prompts and outputs (S-LoRA: 8 512)."""

    length_sigma: float = 0.8
    """Standard deviation of the logarithm of lognormal lengths."""

    lengths_file: str | None = None
    """JSON or JSON lines with input_len and output_len, or ShareGPT's conversations."""

    repeats: int = 3
    """Rounds over all cases; medians are reported."""

    vocab_size: int | None = None
    """Prompt tokens are below this id. Default: the model's vocabulary; 32000 with --base-url."""

    out: str | None = None
    """JSON-lines file for every measurement. What is in it already is not measured again. With several --config: {recipe} in it stands for the name of each."""

    others_limit: float | None = None
    """Share of all cores that other processes may take during a measurement; else it is repeated, twice at most (in process, Linux)."""

    stop_after: float | None = None
    """Seconds after which no further measurement begins; exit status 75. The same command with --out goes on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("random_input_len", "random_output_len", "repeats", "num_prompts", "room"):
            self._at_least(name, getattr(self, name), 1)
        self._at_least("vocab_size", self.vocab_size, 2)
        self._at_least("random_adapters", self.random_adapters, 0)
        for name in (
            "cv",
            "zipf_s",
            "power_alpha",
            "duration",
            "length_sigma",
            "stop_after",
            "others_limit",
        ):
            self._positive(name, getattr(self, name))
        for name in ("concurrency", "adapters_n", "rate"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ParameterError(f"{name} needs different values, got {values}", name)
            for value in values:
                self._positive(name, value)
        if not self.concurrency:
            raise ParameterError("concurrency needs one or several values", "concurrency")
        self._one_of("systems", split(self.systems), get_args(System))
        self._one_of("popularity", split(self.popularity), get_args(Popularity))
        self._one_of("adapter_modules", self.adapter_modules, PROJECTIONS)
        if wrong := [rank for rank in split(self.ranks) if not rank.isdecimal() or int(rank) < 1]:
            raise ParameterError(f"ranks must be positive integers, got {wrong[0]!r}", "ranks")
        if not split(self.ranks):
            raise ParameterError("ranks needs at least one value", "ranks")
        low, high = self.length_range if len(self.length_range) == 2 else (0, 0)
        if not 1 <= low <= high:
            raise ParameterError(
                f"length_range needs two lengths, the smaller first, got {self.length_range}",
                "length_range",
            )
        self._check_pairs()

    def _check_pairs(self) -> None:
        """Options that need, or exclude, each other."""
        if bool(self.base_url) != bool(self.models):
            raise ParameterError("base_url and models go together: one is missing", "models")
        own = self.model or self.lora_modules or self.random_adapters or self.shape
        if self.base_url and own:
            raise ParameterError(
                "base_url: a server brings its own model; leave out --model, --shape, "
                "--lora-modules and --random-adapters",
                "base_url",
            )
        if self.base_url and (wrong := set(split(self.systems)) - {"base", "unmerged"}):
            raise ParameterError(
                f"systems: {min(wrong)} runs in process only; a server is base or unmerged",
                "systems",
            )
        made = self.adapters_to_make
        if made and not self.lora_modules and max(self.adapters_n, default=0) > made:
            raise ParameterError(
                f"adapters_n: {max(self.adapters_n)} adapters are asked for, random_adapters is {made}",
                "adapters_n",
            )
        if self.shape is not None:
            if self.model is not None:
                raise ParameterError("shape and model exclude each other", "shape")
            shape_config(self.shape)
        if (self.arrivals != "closed") != bool(self.rate):
            raise ParameterError(
                "rate goes with --arrivals poisson or gamma, and they with it", "rate"
            )
        if self.arrivals != "closed" and not (self.duration or self.num_prompts):
            raise ParameterError("arrivals need --duration or --num-prompts", "duration")
        if (self.lengths == "file") != bool(self.lengths_file):
            raise ParameterError("lengths_file and --lengths file go together", "lengths_file")
        if self.room and (self.lora_memory or self.base_url):
            raise ParameterError("room sets --lora-memory: leave that out, and --base-url", "room")

    @property
    def open_to_adapters(self) -> bool:
        return False

    @property
    def mixes(self) -> list[list[int]]:
        """Each value of `ranks` as numbers."""
        return [[int(rank) for rank in split([mix])] for mix in self.ranks if split([mix])]

    @property
    def adapters_to_make(self) -> int:
        """Random adapters for each rank mix."""
        if self.random_adapters is not None:
            return self.random_adapters
        given = self.base_url or self.lora_modules
        return 0 if given else max(self.adapters_n, default=0)

    def settings(self) -> dict[str, Any]:
        """What a measurement depends on: all options but where and how long."""
        found = asdict(self)
        for name in ("out", "stop_after", "repeats", "others_limit"):
            del found[name]
        return found

    def cases(self, base: str, adapters: Mapping[str, Sequence[str]]) -> list[Case]:
        """What to compare, given the base model's name and the adapters' by their ranks."""
        cases = []
        for system in split(self.systems):
            if system in ("base", "compiled"):
                cases.append(Case(system=system, models=(base,)))  # type: ignore[arg-type]
                continue
            for ranks, names in adapters.items():
                for n in self._numbers(len(names), base, required=system == "merged"):
                    cases += [
                        Case(
                            system=system,  # type: ignore[arg-type]
                            adapters=n,
                            popularity=popularity,  # type: ignore[arg-type]
                            ranks=ranks,
                            models=tuple(names[:n]),
                        )
                        for popularity in split(self.popularity)[: None if n > 1 else 1]
                    ]
        if not cases:
            raise ParameterError(
                f"systems: {', '.join(split(self.systems))} need an adapter, there is only the "
                f"base model {base!r}",
                "systems",
            )
        return cases

    def _numbers(self, there: int, base: str, *, required: bool) -> list[int]:
        if too_many := [n for n in self.adapters_n if n > there]:
            raise ParameterError(
                f"adapters_n: {too_many[0]} adapters are asked for, {base!r} has {there}",
                "adapters_n",
            )
        if required and not there:
            raise ParameterError(f"systems: merged needs an adapter, {base!r} has none", "systems")
        return list(self.adapters_n) or sorted({min(1, there), there} - {0})

    def schedule(self, cases: Sequence[Case]) -> Schedule:
        """When to measure them."""
        return Schedule(
            cases=cases,
            loads=self.rate or self.concurrency,
            closed=self.arrivals == "closed",
            num_prompts=self.num_prompts,
            duration=self.duration,
            repeats=self.repeats,
        )

    def workload(
        self,
        vocab: int,
        *,
        max_len: int | None = None,
        count: Callable[[str], int] | None = None,
    ) -> Workload:
        """The requests for a model of `vocab` tokens; `count` counts the tokens of a text."""
        if self.vocab_size is not None and self.vocab_size > vocab and not self.base_url:
            raise ParameterError(
                f"vocab_size {self.vocab_size} is more than the model's {vocab}", "vocab_size"
            )
        return Workload(
            vocab=self.vocab_size or vocab,
            input_len=self.random_input_len,
            output_len=self.random_output_len,
            lengths=self.lengths,
            bounds=(self.length_range[0], self.length_range[1]),
            sigma=self.length_sigma,
            pairs=read_lengths(self.lengths_file, count) if self.lengths_file else (),
            max_len=max_len,
            zipf_s=self.zipf_s,
            power_alpha=self.power_alpha,
            arrivals=self.arrivals,
            cv=self.cv,
            seed=self.seed,
        )

    def _one_of(self, name: str, values: Sequence[str], known: Sequence[str]) -> None:
        if wrong := [value for value in values if value not in known]:
            raise ParameterError(f"{name}: {wrong[0]!r} is not one of {', '.join(known)}", name)
        if not values:
            raise ParameterError(f"{name} needs one or several of {', '.join(known)}", name)

    def _at_least(self, name: str, value: int | None, least: int) -> None:
        if value is not None and value < least:
            raise ParameterError(f"{name} must be at least {least}, got {value}", name)

    def _positive(self, name: str, value: float | None) -> None:
        if value is not None and not 0 < value < float("inf"):
            raise ParameterError(f"{name} must be positive, got {value}", name)
