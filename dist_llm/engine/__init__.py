"""Launch, build, one training step, the loop and its hooks."""
