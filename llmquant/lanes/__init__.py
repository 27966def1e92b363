"""Evaluation in the same pass over the weights: each version of them is a lane, with its own hidden states and scores.

scores      lanes, perplexity, KL divergence, and their standard errors
baselines   other ways to quantize the same weights: round-to-nearest and bitsandbytes
"""
