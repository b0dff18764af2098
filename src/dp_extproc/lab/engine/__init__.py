"""Stand in for an SGLang engine: its HTTP contract, release by release, without a model."""
