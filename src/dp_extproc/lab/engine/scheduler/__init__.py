"""Schedule an engine's ranks: steps, queues and KV accounting. Pure: no I/O, no clock; times are passed in."""
