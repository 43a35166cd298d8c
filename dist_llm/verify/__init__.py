"""The parity certificate: does a layout compute what one process computes? Loss, gradient norm, every gradient, the weights after steps."""
