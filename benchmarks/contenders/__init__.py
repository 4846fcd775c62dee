"""What is measured, each in a process of its own: ours, and the peers.

A contender may run under another Python than the command that starts it, one that has neither JAX
nor this package's dependencies; so `network` and `serve` need the standard library alone.
"""
