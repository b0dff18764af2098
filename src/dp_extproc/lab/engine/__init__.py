"""A strict stand-in for an SGLang server: its HTTP contract, release by release, without a model."""
