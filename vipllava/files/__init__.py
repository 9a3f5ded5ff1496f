"""Files that processes share: written whole, downloaded, kept, tried again. Knows no data set."""
