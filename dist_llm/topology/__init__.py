"""Rank arithmetic on integers: the grid of axes, pipeline stages and schedules, columns of a context rank. Never torch."""
