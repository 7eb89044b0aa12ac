"""CogLM: the cross-modal language model."""
