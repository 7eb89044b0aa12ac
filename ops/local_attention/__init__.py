"""2D local attention."""
