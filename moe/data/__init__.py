"""Data: text goes in and blocks of tokens come out. Documents, tokenizers, packing, and the order of training."""
