"""The parts of `python -m jlora.bench`: what is asked for, how it is sent, what is compared, what is
kept. No jax but in merged.py, which is imported when it is needed.
"""
