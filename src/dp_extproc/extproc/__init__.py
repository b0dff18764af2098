"""The ext_proc protocol: a pure state machine, the codec between it and protobuf, and the gRPC service."""
