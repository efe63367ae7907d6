"""What `python -m jlora.inspect` tells: an adapter's facts and norms, a plot, and what others do with it."""
