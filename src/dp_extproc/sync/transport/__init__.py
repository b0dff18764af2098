"""How messages get from replica to replica, and the task that sends and receives them."""
