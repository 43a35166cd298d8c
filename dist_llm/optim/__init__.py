"""Parameter groups, AdamW, learning-rate schedules, clipping."""
