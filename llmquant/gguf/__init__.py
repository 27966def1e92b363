"""GGUF, llama.cpp's file: reading one as a checkpoint, and writing one with all
that llama.cpp wants to know of the model."""
