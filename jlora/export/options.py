"""The flags of `python -m jlora.merge`."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from jlora.errors import ParameterError
from jlora.export.combine import Combination, Majority, Recipe


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """A base checkpoint and adapters in, a checkpoint without adapters or one adapter out; or
    (--extract) two checkpoints in, the adapter between them out."""

    model: str = ""
    """Folder of the Hugging Face checkpoint."""

    adapters: tuple[str, ...] = ()
    """Folders of PEFT adapters."""

    output: str = ""
    """Folder to write. It must not exist."""

    output_adapter: str = ""
    """Folder for the joined adapters as one PEFT adapter, beside --output or instead of it."""

    weights: tuple[float, ...] = ()
    """Weight of each adapter. Default: 1 each."""

    combination_type: Combination = "cat"
    """How several adapters join, with peft's names and maths. cat: the weighted sum of their deltas,
    exact, any ranks. svd: its best approximation by --svd-rank. linear: A's and B's summed, one rank
    only. ties, dare_linear, dare_ties, magnitude_prune: on A's and B's, one rank only. With _svd: on
    the deltas, then cut to --svd-rank."""

    density: float | None = None
    """Share of values that ties, dare and magnitude_prune keep, above 0 and at most 1."""

    majority_sign_method: Majority | None = None
    """What elects the sign of a value in ties. total: the sum of the values (default). frequency: the
    count of their signs."""

    svd_rank: int | None = None
    """Rank of svd and of types that end in _svd. Default: the largest of the adapters'."""

    seed: int = 0
    """Of the random choice in dare."""

    extract: tuple[str, ...] = ()
    """BASE TUNED: write the difference of two checkpoints to --output as an adapter."""

    rank: int | None = None
    """Rank of the adapter that --extract makes. Default: 32."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the result. auto: each tensor's own; adapters: float32."""

    max_shard_size: str = "5GB"
    """Largest file of the result."""

    verify: bool = False
    """Load the result and compare it with the unmerged adapter (--extract: with the tuned model): the
    largest difference of log-probabilities."""

    def __post_init__(self) -> None:
        if self.extract:
            self._check_extract()
            return
        if self.rank is not None:
            raise ParameterError("--rank is for --extract; --svd-rank for adapters", "rank")
        for name in ("model", "adapters"):
            if not getattr(self, name):
                raise ParameterError(f"--{name} is needed", name)
        if not self.output and not self.output_adapter:
            raise ParameterError(
                "--output is needed, or --output-adapter for the adapters alone", "output"
            )
        if self.output and self.output == self.output_adapter:
            raise ParameterError(
                "--output and --output-adapter are the same folder", "output_adapter"
            )
        if self.verify and not self.output:
            raise ParameterError("--verify needs --output: the merged checkpoint", "verify")
        if self.weights and len(self.weights) != len(self.adapters):
            raise ParameterError(
                f"{len(self.weights)} weights for {len(self.adapters)} adapters", "weights"
            )
        if not np.isfinite(self.weights).all():
            raise ParameterError(f"--weights must be finite, got {self.weights}", "weights")
        _ = self.recipe

    def _check_extract(self) -> None:
        if len(self.extract) != 2:
            raise ParameterError(
                f"--extract takes two folders, BASE TUNED, got {len(self.extract)}", "extract"
            )
        if not self.output:
            raise ParameterError("--output is needed: the adapter's folder", "output")
        wrong = [
            "--" + name.replace("_", "-")
            for name in ("model", "adapters", "output_adapter", "weights", "density", "svd_rank")
            if getattr(self, name)
        ]
        if wrong:
            raise ParameterError(f"--extract takes no {', '.join(wrong)}", "extract")

    @property
    def recipe(self) -> Recipe:
        """How the adapters are joined."""
        return Recipe(
            combination=self.combination_type,
            density=self.density,
            majority=self.majority_sign_method,
            svd_rank=self.svd_rank,
            seed=self.seed,
        )
