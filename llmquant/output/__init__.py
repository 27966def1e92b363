"""The finished checkpoint: its containers, and the independent readers that verify it."""
