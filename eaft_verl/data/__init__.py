"""Training data: rows in any chat format become verl's `messages` parquet, tokens, a loss mask and a manifest."""
