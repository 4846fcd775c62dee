"""Command-line tools, one per module: `python -m inception_jax.tools.NAME --help`."""
