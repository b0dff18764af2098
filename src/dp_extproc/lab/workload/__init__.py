"""Make seeded traces of requests, for the simulation and the benchmarks. Pure."""
