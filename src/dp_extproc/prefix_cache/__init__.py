"""Which DP rank has the KV cache of which prefix."""
