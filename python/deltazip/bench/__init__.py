"""Benchmarks of the engine itself, without HTTP: what `deltazip bench` runs."""
