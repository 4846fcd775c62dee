"""Benchmarks of speed and memory, alongside peers where there are any.

Each file is a command with --help: `python -m benchmarks.step_time --help`.
"""
