"""The moe family: one file per op."""
