"""Run a whole fleet on this machine - engines, the service, Envoy, clients - and compare the engines' own placement."""
