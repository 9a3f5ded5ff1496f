"""Files that several processes share: written whole, downloaded, kept, retried. Knows no data set."""
