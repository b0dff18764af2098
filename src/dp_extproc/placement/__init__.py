"""Where a request goes: the load of every rank, the policies over it, rooms, and the books of what was sent. Pure."""
