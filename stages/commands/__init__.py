"""Commands that need torch, started by launch as child processes."""
