"""Held-out bits per byte and the figures it is held against."""
