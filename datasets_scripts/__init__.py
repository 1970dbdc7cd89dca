"""Data sets as they lie on disk, turned into rows; one file a data set."""
