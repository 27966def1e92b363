"""A causal LM without its weights: the model's own code on the meta device, one block of it in memory at a time."""
