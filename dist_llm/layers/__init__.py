"""Layers of a decoder. They receive sizes, functions and groups, never the world."""
