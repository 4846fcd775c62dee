"""TFDS builders: files or arrays in, a standard ArrayRecord data set out."""
