"""Files on disk and in buckets: paths, atomic writes, locks, integrity checks and transfers."""
