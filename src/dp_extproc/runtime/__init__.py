"""The life of a process that places requests: start, readiness, reload, worker processes, drain and stop."""
