"""Named shapes that tests and benchmarks share: (K, part sizes) of one projection group."""

Shapes = dict[str, tuple[int, tuple[int, ...]]]

LLAMA_8B: Shapes = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
SMOLLM2_135M: Shapes = {
    "qkv": (576, (576, 192, 192)),
    "o": (576, (576,)),
    "gate_up": (576, (1536, 1536)),
    "down": (1536, (576,)),
}
TINY: Shapes = {
    "qkv": (256, (128, 64, 64)),
    "o": (256, (128,)),
    "gate_up": (256, (128, 128)),
    "down": (512, (64,)),
}
"""Small enough for the interpreter on a CPU, and legal for every backend."""
