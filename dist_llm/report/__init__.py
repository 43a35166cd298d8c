"""What a run says of itself: metrics.jsonl (the truth), console, mirrors, plots, the HTML report. Never torch."""
