"""What engines answer, as far as the service reads it: the first event of a stream, and log probabilities."""
