"""The life of a process of the service: start, readiness, reload, worker processes, drain and stop."""
