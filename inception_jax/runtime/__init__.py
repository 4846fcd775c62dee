"""Devices, processes, signals, sharding, the compilation cache and the environment."""
