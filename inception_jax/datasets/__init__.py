"""What the examples are.

Data sets by name, the builders that turn original files into TFDS data sets of ArrayRecords, and
the decoded cache. TFDS is imported here and nowhere else, and only when records are written or
read by its description.
"""
