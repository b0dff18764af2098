"""Which rank holds the beginning of which prompt."""
