"""How an endpoint is read."""
