"""A fleet as discrete events, driven by the service's own policies and ledgers: what placement would do, in seconds."""
