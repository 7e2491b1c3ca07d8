"""The quant family: one file per op."""
