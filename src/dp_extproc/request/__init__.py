"""One client request: what it asks for, how large it is, and how its body is rewritten for the legs. Pure."""
