"""The stream that training reads: order, batches, finished samples, the loader, the DataModule."""
