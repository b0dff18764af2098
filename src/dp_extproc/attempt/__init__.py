"""One attempt of a request, as a state machine."""
