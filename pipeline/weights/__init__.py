"""Weights in and out: files, published layouts, folders that serve wherever a run does."""
