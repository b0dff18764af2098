"""What clients ask for: seeded traces of requests, for the simulator and the benchmarks. Pure."""
