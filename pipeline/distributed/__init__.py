"""Process groups, rank arithmetic, seeds."""
