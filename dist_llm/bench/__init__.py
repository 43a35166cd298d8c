"""Races against peers, interleaved, with the ceiling of the same run."""
