"""Everything an operator can write in a recipe; torch-free."""
