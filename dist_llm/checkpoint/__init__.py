"""Checkpoints: safetensors under logical names, a hashed manifest, a commit that survives a kill."""
