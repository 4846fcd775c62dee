"""Files on disk: paths, atomic writes, locks and integrity checks."""
