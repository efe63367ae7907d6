"""An adapter in host memory: the low-rank pair of every projection that it touches.

Frozen. Its identity is its content: `uid` hashes what changes a result (tensors and scaling),
never a name or a path.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class LoraWeights:
    """One projection's pair: `delta W = scaling · b @ a`. `scaling` is not folded in here."""

    a: Float[np.ndarray, "R K"]
    """float32, bfloat16 or float16, as it was stored."""
    b: Float[np.ndarray, "N R"]
    rank: int
    scaling: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """All that a PEFT LoRA folder says that matters at inference."""

    uid: str
    """sha256 over scaling and tensors (see `content_hash`)."""
    path: str
    base_model: str | None
    """base_model_name_or_path of adapter_config.json."""
    rank: int
    """The largest rank of any projection."""
    weights: dict[tuple[int, str], LoraWeights]
    """Keyed by (layer, projection), such as (3, "q_proj")."""
    chat_template: str | None

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors, as stored in host memory."""
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.weights.values())

    @cached_property
    def modules(self) -> list[str]:
        """Names of the projections that it touches in any layer, sorted."""
        return sorted({projection for _, projection in self.weights})


def content_hash(weights: dict[tuple[int, str], LoraWeights]) -> str:
    """The uid of an adapter with these weights: equal exactly when results are equal."""
    digest = hashlib.sha256(b"jlora adapter 1\n")
    for (layer, projection), pair in sorted(weights.items()):
        facts = f"{layer} {projection} {float(pair.scaling).hex()}"
        for tensor in (pair.a, pair.b):
            digest.update(f"{facts} {tensor.dtype.name} {tensor.shape}\n".encode())
            # A contiguous view of bytes: hashlib takes no bfloat16, and tobytes() would copy.
            digest.update(np.ascontiguousarray(tensor).view(np.uint8).data)
    return digest.hexdigest()
