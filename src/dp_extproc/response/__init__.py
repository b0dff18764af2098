"""What engines answer, as far as the service reads it: first events, and what prefill's response has for the client's."""
