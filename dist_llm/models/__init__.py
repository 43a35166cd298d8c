"""Models built from one block; they return hidden states."""
