"""Discovery of the endpoints of the fleet."""
