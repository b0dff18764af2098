"""Kubernetes as a source of endpoints: EndpointSlices of Services, or pods."""
