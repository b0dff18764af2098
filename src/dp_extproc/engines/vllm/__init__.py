"""vLLM engines: the adapter and the readers of pages."""
