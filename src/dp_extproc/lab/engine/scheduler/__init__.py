"""The engine's scheduler: steps, queues and KV accounting of DP ranks. Pure: no I/O, no clock; times are passed in."""
