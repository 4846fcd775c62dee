"""The contenders, ours and the peers, each run in a separate process.

A contender may run under a Python without JAX and this package's dependencies, so `network` and
`serve` need only the standard library.
"""
