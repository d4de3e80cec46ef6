"""The gRPC services of the frontend: the same contracts as a worker's, for whole requests."""
