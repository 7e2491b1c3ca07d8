"""Cases of the moe family."""
