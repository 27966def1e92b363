"""Text -> windows of token ids: corpora, tokenizers, mixtures, and the check that the texts do not overlap."""
