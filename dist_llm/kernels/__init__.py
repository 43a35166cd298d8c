"""Fused ops: one folder an op, each with its plain PyTorch definition and a literal table of implementations."""
