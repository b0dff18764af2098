"""What each rank has to do: reservations, and what samples show beyond them."""
