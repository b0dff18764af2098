"""Output formats over the same listeners and clusters, one module each."""
