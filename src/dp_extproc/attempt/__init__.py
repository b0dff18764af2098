"""One attempt of a request as a state machine: events in, commands out."""
