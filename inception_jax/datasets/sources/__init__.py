"""The files of a data set's source: folders and archives, and official downloads."""
