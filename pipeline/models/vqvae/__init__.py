"""The hierarchical VQVAE (image tokenizer network)."""
