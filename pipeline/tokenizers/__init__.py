"""Text and image tokenizers and the id layout."""
