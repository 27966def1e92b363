"""GGUF, llama.cpp's file format: read one as a checkpoint, and write one that llama.cpp understands.

A GGUF file holds the weights, the config and the tokenizer, with names and conventions of its own. Each direction has
its modules:

    reading   header (bytes -> metadata, tensors), config, vocabulary, blocks, source
    writing   model (names, metadata), tokenizer, file (metadata, tensors -> bytes)
    both      gpt2 (what differs in GPT-2)
"""
