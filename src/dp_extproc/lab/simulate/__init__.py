"""Simulate a fleet as discrete events, with the service's own policies and reservations, in seconds."""
