"""Carry messages between replicas."""
