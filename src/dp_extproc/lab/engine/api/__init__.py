"""Serve the engine's HTTP: SGLang's paths and shapes."""
