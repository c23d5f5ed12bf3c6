"""Bytes that nobody meant for us, thrown at everything that reads bytes from others."""
