"""Replicas tell each other what they have sent, so that they do not all pick the rank that looked idle to each."""
