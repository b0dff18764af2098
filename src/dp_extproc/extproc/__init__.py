"""The gRPC service of ext_proc: protobuf messages become events of attempts, and their commands become replies."""
