"""Plain PyTorch code of the same models, as somebody without us would write it."""
