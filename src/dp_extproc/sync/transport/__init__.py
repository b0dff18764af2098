"""How messages between replicas travel."""
