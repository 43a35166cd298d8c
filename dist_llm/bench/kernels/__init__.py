"""The races of single kernels against torch, ``torch.compile`` and the best-known alternatives.

A module for each case offers ``races(device, tiny=False)``, the standard shape first; ``tiny`` shapes show that a race can be run, in milliseconds.
"""
