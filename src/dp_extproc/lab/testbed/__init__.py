"""Run engines, the service and Envoy as real processes on this machine, for tests, the demo and the benchmarks."""
