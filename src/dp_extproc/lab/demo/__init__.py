"""A whole fleet on this machine: engines, the service, Envoy, and clients; the engines' own placement against ours."""
