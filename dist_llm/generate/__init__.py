"""Text from a trained model: sampling, beam search, key-value cache."""
