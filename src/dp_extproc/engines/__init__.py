"""What an engine is and how it is read; one adapter for each kind."""
