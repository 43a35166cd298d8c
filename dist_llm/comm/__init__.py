"""Groups of ranks as values, and the collectives that run on them."""
