"""Text in, blocks of tokens out: documents, tokenizers, packing, and the order of training."""
