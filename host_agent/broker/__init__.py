"""Message brokers: the embedded one, and the checks for external ones."""
