"""The parts of `python -m jlora.bench`: random adapters, the load, what is loaded, the report. No jax."""
