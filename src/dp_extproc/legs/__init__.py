"""Sends prefill legs to their engines, where the service does that instead of Envoy."""
