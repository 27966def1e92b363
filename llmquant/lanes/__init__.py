"""Evaluation in the same pass: every version of the weights is a lane with hidden states and scores of its own."""
