"""What a user can choose when a model is loaded: the flags that `serve`, `generate` and `LLM` share.

Plain values only, and no jax: `--mesh` must be known before jax is imported.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from jlora.demo import DEMO_ADAPTERS
from jlora.errors import ParameterError

_PAGES = re.compile(r"(\d+)\s*pages?", re.IGNORECASE | re.ASCII)
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)


def parse_bytes(text: str | None, param: str) -> int | None:
    """`"512MiB"`, `"2GB"`, `"1.5G"` or plain bytes; a bare letter means the binary unit."""
    if text is None:
        return None
    match = _BYTES.fullmatch(text.strip())
    if not match:
        raise ParameterError(f"{param}: {text!r} is not a size; write e.g. 512MiB or 2GB", param)
    number, unit, suffix = match.groups()
    base = 1000 if (suffix or "").lower() == "b" and unit else 1024
    return int(float(number) * base ** " kmgt".index(unit.lower() or " "))


def parse_pages(text: str | None, param: str) -> int | None:
    """The count in `"32pages"` or `"1 page"`; None if the text does not speak of pages."""
    match = _PAGES.fullmatch((text or "").strip())
    if match is None:
        return None
    if (pages := int(match[1])) < 1:
        raise ParameterError(f"{param}: at least 1 page is needed, got {text!r}", param)
    return pages


@dataclass(frozen=True, kw_only=True)
class LoraModule:
    """One adapter to load at start."""

    name: str
    path: str
    pinned: bool = False
    base_model_name: str | None = None


def parse_lora_module(text: str) -> LoraModule:
    """`NAME=PATH`, a bare `PATH` (its last part is the name), or vLLM's or SGLang's JSON."""
    if text.lstrip().startswith("{"):
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ParameterError(
                f"lora_modules: {text!r} is not JSON ({error})", "lora_modules"
            ) from None
        keys = {"name", "path", "lora_name", "lora_path", "pinned", "base_model_name"}
        if unknown := sorted(set(body) - keys):
            raise ParameterError(
                f"lora_modules: unknown key {unknown[0]!r} in {text!r}; known: {sorted(keys)}",
                "lora_modules",
            )
        name = body.get("name", body.get("lora_name"))
        path = body.get("path", body.get("lora_path"))
        pinned, base = body.get("pinned", False), body.get("base_model_name")
        if not (isinstance(name, str) and isinstance(path, str) and isinstance(pinned, bool)):
            raise ParameterError(
                f"lora_modules: {text!r} needs the strings 'name' and 'path'", "lora_modules"
            )
        return LoraModule(name=name, path=path, pinned=pinned, base_model_name=base)
    name, separator, path = text.partition("=")
    if not separator:
        name, path = Path(text).name, text
    if not (name and path):
        raise ParameterError(f"lora_modules: {text!r} is not NAME=PATH", "lora_modules")
    return LoraModule(name=name, path=path)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A base model, its adapters, and the memory that they may use."""

    ABSENT: ClassVar[dict[str, str]] = {
        "max_lora_rank": "adapters of any rank load and share a step; leave it out",
        "lora_dtype": "adapters are kept in the type of --dtype; leave it out",
        "trust_remote_code": "code of a checkpoint is never run; leave it out",
        "enable_chunked_prefill": "it is always on; --max-num-batched-tokens is the size of a chunk",
    }
    """Flags of vLLM's that a LoRA server's command line often has, and why they are not here."""

    model: str | None = None
    """Folder of a Hugging Face checkpoint. Without it: the embedded SmolLM2-135M-Instruct."""

    served_model_name: tuple[str, ...] = ()
    """Names under which the base model answers; the first is the one shown. Default: the folder's name."""

    lora_modules: tuple[str, ...] = field(default=(), metadata={"aliases": ("--lora-paths",)})
    """Adapters to load at start: NAME=PATH or JSON with name, path, pinned."""

    mesh: int = field(default=1, metadata={"aliases": ("--tensor-parallel-size", "--tp-size")})
    """Devices to shard the model over. Without a GPU these are virtual CPU devices."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and cache. auto: the checkpoint's on a GPU, float32 on a CPU."""

    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: random weights in the shape of config.json, for benchmarks."""

    max_model_len: int | None = field(default=None, metadata={"aliases": ("--context-length",)})
    """Tokens of prompt and output together. Default: the checkpoint's limit; with longrope (Phi-3 128k, Phi-4-mini) the length of pretraining, beyond which the long factors hold, then for texts of all lengths."""

    max_num_seqs: int | None = field(
        default=None, metadata={"aliases": ("--max-running-requests",)}
    )
    """Requests that may run at once. Default: 32 on a CPU, 256 on a GPU."""

    max_num_batched_tokens: int | None = field(
        default=None, metadata={"aliases": ("--chunked-prefill-size",)}
    )
    """Prompt tokens that one step may compute; on a GPU decode rows count, too, as in vLLM. Default:
    256 on a CPU, 2048 on a GPU."""

    max_loras: int = field(default=8, metadata={"aliases": ("--max-loras-per-batch",)})
    """Different adapters that may share one step."""

    max_cpu_loras: int | None = field(default=None, metadata={"aliases": ("--max-loaded-loras",)})
    """Adapters kept in host memory; others are read from disk when they are asked for. Default: all."""

    lora_memory: str | None = None
    """Memory for adapters on each device, e.g. 512MiB, or 32pages (of 16 rank rows on a GPU, 8 on a CPU). Default: room for max_loras adapters of rank 64, of rank 16 where they change experts."""

    merge: str | None = None
    """Serve this adapter of lora_modules merged into the weights, at no cost; nothing else is served until it is unmerged."""

    lora_support: Literal["auto", "plain", "vectors", "norms", "full", "experts"] = "auto"
    """What adapters may change: plain: the projections of layers; vectors: also by DoRA and biases; norms: also trained norms; full: embed_tokens and lm_head too; experts: routers and experts too (pages then hold every expert's ranks). Every step with adapters pays for it. auto: exactly what lora_modules need."""

    lora_target_modules: tuple[str, ...] = ()
    """Projections that adapters may change, as q_proj v_proj, or all. Those that share an input come together: q, k and v; gate and up. Fewer make smaller rank pages and faster steps. Default: all; for a server without --lora-dir what lora_modules change."""

    lora_extra_vocab_size: int | None = None
    """Tokens that adapters may add to the vocabulary. Default: as many as lora_modules need."""

    lora_host_memory: str | None = None
    """Host memory for adapters, e.g. 4GiB. Default: no limit."""

    gpu_memory_utilization: float = field(
        default=0.9, metadata={"aliases": ("--mem-fraction-static",)}
    )
    """Share of a GPU's memory that weights, adapters and KV cache may take together. jax's pool is made a little larger, for temporary buffers, at most 0.95 of the GPU; XLA_CLIENT_MEM_FRACTION, if set, is its share instead."""

    kv_cache_memory: str | None = None
    """Memory for the KV cache over all devices, e.g. 2GiB. Default: what the GPU has left; on a CPU max_num_seqs times max_model_len, at most 1GiB."""

    enable_prefix_caching: bool = True
    """Reuse the KV pages of prompts that begin alike (per adapter)."""

    max_logprobs: int = 20
    """Most logprobs per token that a request may ask for."""

    seed: int = 0
    """Seed of requests that bring none."""

    def __post_init__(self) -> None:
        for name in (
            "mesh",
            "max_loras",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ParameterError(f"{name} must be at least 1, got {value}", name)
        if (self.lora_extra_vocab_size or 0) < 0:
            raise ParameterError(
                f"lora_extra_vocab_size must not be negative, got {self.lora_extra_vocab_size}",
                "lora_extra_vocab_size",
            )
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ParameterError(
                f"max_cpu_loras ({self.max_cpu_loras}) must be at least max_loras ({self.max_loras})",
                "max_cpu_loras",
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ParameterError(
                f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}",
                "gpu_memory_utilization",
            )
        if self.max_logprobs < 0:
            raise ParameterError(
                f"max_logprobs must not be negative, got {self.max_logprobs}", "max_logprobs"
            )
        if parse_pages(self.lora_memory, "lora_memory") is None:
            parse_bytes(self.lora_memory, "lora_memory")
        for name in ("lora_host_memory", "kv_cache_memory"):
            parse_bytes(getattr(self, name), name)
        names = [module.name for module in self.adapters]
        for name in names:
            if names.count(name) > 1:
                raise ParameterError(f"lora_modules names {name!r} more than once", "lora_modules")
        self.check_adapter("merge", self.merge)

    def check_adapter(self, param: str, name: str | None) -> None:
        """ParameterError unless `name` is an adapter of the start, `base:adapter` or a mix of them:
        told before minutes of compiling."""
        if name is None:
            return
        known = [module.name for module in self.start_adapters]
        is_mix = "*" in name or "+" in name
        if not is_mix and name.partition(":")[2] not in known and name not in known:
            raise ParameterError(
                f"{param}: no adapter is named {name!r}; there are: {', '.join(known) or 'none'}",
                param,
            )

    @property
    def open_to_adapters(self) -> bool:
        """Whether adapters may come that are not in `lora_modules`."""
        return True

    @property
    def adapters(self) -> tuple[LoraModule, ...]:
        """`lora_modules`, parsed."""
        return tuple(parse_lora_module(text) for text in self.lora_modules)

    @property
    def start_adapters(self) -> tuple[LoraModule, ...]:
        """`adapters`; the embedded model brings its demo adapters."""
        given = self.adapters
        if self.model is not None:
            return given
        named = {module.name for module in given}
        demo = (LoraModule(name=name, path=str(path)) for name, path in DEMO_ADAPTERS.items())
        return (*(module for module in demo if module.name not in named), *given)


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ModelOptions):
    """A model behind an HTTP port."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface."""

    port: int = 8000
    """Port to listen on; 0 takes a free one."""

    api_key: tuple[str, ...] = ()
    """Keys that clients must send as `Authorization: Bearer KEY`. Also: JLORA_API_KEY in the environment."""

    lora_dir: tuple[str, ...] = ()
    """Folders that adapters may be loaded from at run time. Without it the load routes are off."""

    shutdown_timeout: float = 30.0
    """Seconds that running requests get to finish after SIGTERM or Ctrl-C."""

    max_body_bytes: int = 64 << 20
    """Largest request body, in bytes."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log lines to show."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port < 65536:
            raise ParameterError(f"port must be between 0 and 65535, got {self.port}", "port")
        if not 0 <= self.shutdown_timeout < float("inf"):
            raise ParameterError(
                f"shutdown_timeout must be seconds of at least 0, got {self.shutdown_timeout}",
                "shutdown_timeout",
            )
        if self.max_body_bytes < 1:
            raise ParameterError(
                f"max_body_bytes must be positive, got {self.max_body_bytes}", "max_body_bytes"
            )
        if any(not key for key in self.api_key):
            raise ParameterError("api_key must not be empty", "api_key")
        for root in self.lora_dir:
            if not Path(root).is_dir():
                raise ParameterError(f"lora_dir: there is no folder {root!r}", "lora_dir")

    @property
    def open_to_adapters(self) -> bool:
        return bool(self.lora_dir)
