"""GPU kernels in Pallas and their plain-XLA twins. Needs jax and numpy only; usable without jlora."""
