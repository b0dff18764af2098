"""Replicas publish their in-flight requests, so that they do not all pick the rank that looks idle to each of them."""
