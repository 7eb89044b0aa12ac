"""From pictures and captions to training samples."""
