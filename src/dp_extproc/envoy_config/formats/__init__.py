"""The forms in which Envoy's side of a configuration is printed: one module for each, over the same typed objects."""
