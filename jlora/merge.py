"""`python -m jlora.merge --model BASE --adapters A [B ...] --output DIR`: adapters for good."""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from jlora.adapters.peft import read_adapter
from jlora.cli import fail, parse
from jlora.console import ProgressBars, setup_logging
from jlora.engine.params import SamplingParams
from jlora.errors import JloraError, ParameterError
from jlora.llm import LLM
from jlora.merging import Pair, combine, merge_checkpoint, write_adapter
from jlora.models.config import ModelConfig
from jlora.options import ModelOptions, parse_bytes
from jlora.outputs import LoRARequest

PROG = "jlora.merge"
VERIFY_TOKENS = 48
"""Tokens of the random prompt that --verify scores."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """A base checkpoint and adapters in, a checkpoint without adapters out."""

    model: str = ""
    """Folder of the Hugging Face checkpoint."""

    adapters: tuple[str, ...] = ()
    """Folders of PEFT adapters."""

    output: str = ""
    """Folder to write. It must not exist."""

    weights: tuple[float, ...] = ()
    """Weight of each adapter. Default: 1 each."""

    combination_type: Literal["cat", "linear"] = "cat"
    """How several adapters join, in peft's words. cat: the weighted sum of their deltas, any ranks.
    linear: A's and B's summed, one rank only."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the result. auto: each tensor's own."""

    max_shard_size: str = "5GB"
    """Largest file of the result."""

    verify: bool = False
    """Load the result and compare it with the unmerged adapter: the largest difference of
    log-probabilities."""

    def __post_init__(self) -> None:
        for name in ("model", "adapters", "output"):
            if not getattr(self, name):
                raise ParameterError(f"--{name} is needed", name)
        if self.weights and len(self.weights) != len(self.adapters):
            raise ParameterError(
                f"{len(self.weights)} weights for {len(self.adapters)} adapters", "weights"
            )


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(MergeOptions, argv, prog=PROG)
    setup_logging("warning")
    try:
        with ProgressBars() as progress:
            merge(options, progress)
        print(f"merged: {options.output}")
        if options.verify:
            difference, effect = verify(options)
            print(
                f"verified: log-probabilities differ from the unmerged adapter's by "
                f"{difference:.2g} at most; the adapter moves them by up to {effect:.2g}"
            )
    except JloraError as error:
        fail(PROG, error)
    except KeyboardInterrupt:
        return 130
    return 0


def merge(options: MergeOptions, progress: ProgressBars) -> None:
    """Writes the merged checkpoint. Raises a JloraError with one line for the user."""

    pairs, template = _pairs(options)
    size = parse_bytes(options.max_shard_size, "max_shard_size")
    assert size is not None
    merge_checkpoint(
        Path(options.model),
        pairs,
        Path(options.output),
        dtype=options.dtype,
        max_shard_bytes=size,
        chat_template=template,
        progress=lambda done, total: progress("merging tensors", done, total),
    )


def _pairs(options: MergeOptions) -> tuple[dict[tuple[int, str], Pair], str | None]:
    """The combined delta, and the chat template of a single adapter that brings one."""

    cfg = ModelConfig.from_folder(options.model)
    adapters = [read_adapter(path, cfg) for path in options.adapters]
    weights = options.weights or (1.0,) * len(adapters)
    template = adapters[0].chat_template if len(adapters) == 1 else None
    return combine(adapters, weights, options.combination_type), template


def verify(options: MergeOptions) -> tuple[float, float]:
    """(largest difference between merged and unmerged log-probabilities of a random prompt, largest
    difference between unmerged and base)."""

    pairs, _ = _pairs(options)
    vocab = ModelConfig.from_folder(options.model).vocab
    prompt = np.random.default_rng(0).integers(0, vocab, VERIFY_TOKENS).tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter"
        rank = write_adapter(path, pairs, Path(options.model))

        with _load(options.model, rank) as llm:
            base = score(llm, prompt, None)
            unmerged = score(llm, prompt, LoRARequest("adapter", 1, str(path)))
    with _load(options.output, rank) as llm:
        merged = score(llm, prompt, None)
    return float(np.abs(merged - unmerged).max()), float(np.abs(unmerged - base).max())


def _load(model: str, rank: int) -> LLM:
    """A float32 engine just large enough for the prompt and an adapter of `rank`."""
    return LLM.load(
        ModelOptions(
            model=model,
            dtype="float32",
            max_model_len=VERIFY_TOKENS + 16,
            max_num_seqs=1,
            max_num_batched_tokens=64,
            max_loras=-(-rank // 64),
        )
    )


def score(llm: LLM, prompt: list[int], lora: LoRARequest | None) -> np.ndarray:
    """Log-probability of each prompt token after the first: [tokens - 1]."""

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    (output,) = llm.generate([prompt], params, lora_request=lora)
    assert output.prompt_logprobs is not None
    return np.asarray(
        [
            entry[token].logprob
            for entry, token in zip(output.prompt_logprobs, prompt, strict=True)
            if entry
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
