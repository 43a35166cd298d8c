"""The races of single kernels against torch, ``torch.compile`` and the best-known alternatives."""
