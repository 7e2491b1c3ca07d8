"""The mla family: one file per op."""
