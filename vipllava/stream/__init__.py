"""The stream that training reads: order, batches, samples made ready, the loader, Lightning's door."""
