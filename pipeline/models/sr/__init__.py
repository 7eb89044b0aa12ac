"""Direct and iterative super-resolution."""
