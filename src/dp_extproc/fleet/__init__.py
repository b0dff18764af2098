"""The endpoints of the fleet: their discovery, and the monitor that polls them."""
