"""One run on several processes: each has a part of every batch, and all have the same state."""
