"""A run as its user reads it: report page, plots and diagnosis. Imports no JAX."""
