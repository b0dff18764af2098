"""What the operator sees: metrics, the pages of the admin port, and the logs of what changes."""
