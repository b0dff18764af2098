"""Scheduling: which endpoint and rank each leg of a request goes to, and how the request is encoded for them. Pure."""
