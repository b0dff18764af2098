"""The engine's HTTP: SGLang's paths, shapes and habits."""
