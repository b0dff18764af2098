"""Running the service: its life cycle, what it shows of itself, and how it says whether it is well."""
