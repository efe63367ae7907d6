"""What is asked for: which adapter, how long, when. Pure and seeded; the same seed and label give the
same requests in every process.

Lengths and arrivals do not depend on the case that is measured, so that all cases of a round get
the same ones; prompt tokens do, so that no prefix cache helps.
"""

import itertools
import random
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Popularity = Literal["identical", "distinct", "uniform", "zipf", "power"]
"""identical: always the first adapter. distinct: all in turn. uniform: each as likely. zipf: the
k-th with chance k^-s (Punica: s = 1.5). power: S-LoRA's power law, the density of x = k/n is
alpha · x^(alpha - 1); alpha 1 is uniform."""

Lengths = Literal["fixed", "uniform", "lognormal", "file"]
"""fixed: as told. uniform: prompt and output each between two bounds. lognormal: medians as told.
file: pairs out of a file, drawn."""

Arrivals = Literal["closed", "poisson", "gamma"]
"""closed: a client sends its next request when its last one has ended. poisson: at a rate. gamma:
at a rate, the gaps' standard deviation over their mean is cv (S-LoRA; 1 is poisson)."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request."""

    at: float
    """Seconds after the start at which it arrives; 0 in a closed loop."""
    adapter: int | None
    """Number among the case's adapters; None: the base model."""
    prompt: list[int]
    output_len: int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How requests are drawn."""

    vocab: int
    """Prompt tokens are drawn below this id."""
    input_len: int = 64
    """Prompt tokens: of all requests (fixed), or the median (lognormal)."""
    output_len: int = 64
    """Tokens to generate, likewise."""
    lengths: Lengths = "fixed"
    bounds: tuple[int, int] = (8, 512)
    """Of uniform lengths, both included."""
    sigma: float = 0.8
    """Of the logarithm of lognormal lengths."""
    pairs: Sequence[tuple[int, int]] = ()
    """(prompt, output) lengths that `file` draws from."""
    max_len: int | None = None
    """Tokens of prompt and output together; longer draws are cut to it, the output first."""
    zipf_s: float = 1.5
    power_alpha: float = 1.0
    arrivals: Arrivals = "closed"
    cv: float = 1.0
    seed: int = 0

    def requests(
        self,
        *label: object,
        case: object = "",
        adapters: int = 0,
        popularity: Popularity = "distinct",
        rate: float = 1.0,
    ) -> Iterator[Request]:
        """Without end, in order of arrival, for `adapters` adapters (0: the base model)."""
        picks = self.picks(adapters, popularity, *label)
        draws = zip(self.times(rate, *label), self.sizes(*label), picks, strict=False)
        tokens = self._rng("tokens", case, *label)
        for at, (input_len, output_len), adapter in draws:
            prompt = [tokens.randrange(self.vocab) for _ in range(input_len)]
            yield Request(at=at, adapter=adapter, prompt=prompt, output_len=output_len)

    def picks(
        self, adapters: int, popularity: Popularity, *label: object
    ) -> Iterator[int] | Iterator[None]:
        """Numbers of adapters; None without end if there are none."""
        if adapters == 0:
            return itertools.repeat(None)
        if popularity == "identical":
            return itertools.repeat(0)
        if popularity == "distinct":
            return itertools.cycle(range(adapters))
        rng = self._rng("popularity", popularity, adapters, *label)
        return self._drawn(rng, adapters, popularity)

    def _drawn(self, rng: random.Random, adapters: int, popularity: Popularity) -> Iterator[int]:
        if popularity == "zipf":
            steps = list(itertools.accumulate(k**-self.zipf_s for k in range(1, adapters + 1)))
            while True:
                yield min(bisect(steps, rng.random() * steps[-1]), adapters - 1)
        alpha = self.power_alpha if popularity == "power" else 1.0
        while True:  # the inverse of the distribution function x^alpha
            yield min(int(adapters * rng.random() ** (1 / alpha)), adapters - 1)

    def times(self, rate: float, *label: object) -> Iterator[float]:
        """Seconds at which requests arrive."""
        if self.arrivals == "closed":
            yield from itertools.repeat(0.0)
        rng, now = self._rng("arrivals", rate, *label), 0.0
        shape = 1.0 if self.arrivals == "poisson" else self.cv**-2
        while True:
            now += rng.gammavariate(shape, 1 / (rate * shape))
            yield now

    def sizes(self, *label: object) -> Iterator[tuple[int, int]]:
        """(prompt, output) lengths, cut to `max_len`."""
        rng = self._rng("lengths", *label)
        while True:
            yield self._cut(*self._size(rng))

    def _size(self, rng: random.Random) -> tuple[int, int]:
        if self.lengths == "uniform":
            return rng.randint(*self.bounds), rng.randint(*self.bounds)
        if self.lengths == "lognormal":
            factors = rng.lognormvariate(0, self.sigma), rng.lognormvariate(0, self.sigma)
            sizes = self.input_len * factors[0], self.output_len * factors[1]
            return max(1, round(sizes[0])), max(1, round(sizes[1]))
        if self.lengths == "file":
            return rng.choice(self.pairs)
        return self.input_len, self.output_len

    def _cut(self, input_len: int, output_len: int) -> tuple[int, int]:
        if self.max_len is None:
            return input_len, output_len
        input_len = min(input_len, self.max_len - 1)
        return input_len, min(output_len, self.max_len - input_len)

    def _rng(self, *label: object) -> random.Random:
        return random.Random(repr((self.seed, *label)))
