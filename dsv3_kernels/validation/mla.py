"""Cases of the mla family."""
