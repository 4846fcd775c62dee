"""Data sets: where examples come from.

Contains the registered data sets, the builders that convert original files to TFDS data sets in
ArrayRecord format, and the decoded cache. TFDS is imported only in this package, and only to write
records or to read a data set by its TFDS description.
"""
