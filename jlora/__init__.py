"""jlora: many LoRA adapters on one base model, in JAX. Importing it imports neither jax nor torch."""

from jlora.engine.params import SamplingParams as SamplingParams
from jlora.llm import LLM as LLM
from jlora.outputs import CompletionOutput as CompletionOutput
from jlora.outputs import LoRARequest as LoRARequest
from jlora.outputs import RequestOutput as RequestOutput
