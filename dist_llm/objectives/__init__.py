"""What is minimised, as a function of hidden states, head and targets."""
