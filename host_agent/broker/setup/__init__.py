"""Ready configurations of external brokers, as `vmctl broker init` writes them."""
