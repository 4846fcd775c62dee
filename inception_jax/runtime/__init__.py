"""The machine: devices, processes, signals, sharding, compilation cache and environment."""
