"""Real processes on this machine: engines, the service and Envoy. For the tests, the demo and the benchmarks."""
