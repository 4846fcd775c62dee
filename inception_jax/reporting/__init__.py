"""Reports on runs: the HTML report, plots and the diagnosis. Does not import JAX."""
