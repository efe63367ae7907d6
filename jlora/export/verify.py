"""Merged against unmerged: two engines score one random prompt."""

import numpy as np

from jlora.adapters.adapter import Level
from jlora.engine.params import SamplingParams
from jlora.llm import LLM
from jlora.models.config import ModelConfig
from jlora.options import ModelOptions
from jlora.outputs import LoRARequest

VERIFY_TOKENS = 48
"""Tokens of the random prompt."""


def compare(
    base: str, adapter: str, result: str, rank: int, support: Level, extra_vocab: int = 0
) -> tuple[float, float]:
    """(largest difference of log-probabilities between base + adapter and `result`, and between base
    + adapter and base)."""
    vocab = ModelConfig.from_folder(base).vocab
    prompt = np.random.default_rng(0).integers(0, vocab, VERIFY_TOKENS).tolist()
    with _load(base, rank, support, extra_vocab) as llm:
        plain = score(llm, prompt, None)
        unmerged = score(llm, prompt, LoRARequest("adapter", 1, adapter))
    with _load(result, 1, "plain") as llm:
        merged = score(llm, prompt, None)
    return float(np.abs(merged - unmerged).max()), float(np.abs(unmerged - plain).max())


def _load(model: str, rank: int, support: Level, extra_vocab: int = 0) -> LLM:
    """A float32 engine just large enough for the prompt and an adapter of `rank`."""
    return LLM.load(
        ModelOptions(
            model=model,
            dtype="float32",
            max_model_len=VERIFY_TOKENS + 16,
            max_num_seqs=1,
            max_num_batched_tokens=64,
            max_loras=max(1, -(-rank // 64)),
            lora_support=support,
            lora_extra_vocab_size=extra_vocab,
            # pages of 8 ranks at least; by itself it would take fewer where they hold experts
            lora_memory=f"{-(-rank // 8)}pages" if support == "experts" else None,
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
