"""Text to tokens to rows: tokenizer, shards and their index, the ordered loader."""
