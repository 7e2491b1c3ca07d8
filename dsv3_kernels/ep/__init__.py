"""The ep family: one file per op."""
