"""What the examples are.

The registry of data sets, and for each one the builder that turns its original files into a
standard TFDS dataset of ArrayRecords. TFDS is imported here and nowhere else, and only when
something has to be prepared.
"""
