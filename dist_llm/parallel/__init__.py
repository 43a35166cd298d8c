"""Plans applied to a built model, and the ranks of one machine that run them."""
