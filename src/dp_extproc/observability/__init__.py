"""Metrics, the pages of the admin port, and the logs of engine events."""
