"""The parts of a sandwich-LN transformer."""
