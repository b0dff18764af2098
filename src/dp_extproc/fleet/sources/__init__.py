"""Sources of engine events: how an endpoint is read."""
