"""What engines answer, as far as the service reads it: first events, and parts that only prefill's response has."""
