"""Small commands around a run, one a module: `python -m inception_jax.tools.NAME --help`."""
