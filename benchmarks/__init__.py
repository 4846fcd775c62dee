"""What measures speed and memory, beside peers where there are any, in one run.

Each file is a command with a --help: `python -m benchmarks.step_time --help`.
"""
