"""Per-model training code."""
