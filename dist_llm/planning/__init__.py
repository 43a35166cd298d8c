"""Arithmetic about runs before they start: parameters, FLOPs, memory, disk, size for a budget. Never torch."""
