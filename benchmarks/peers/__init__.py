"""What benchmarks compare with: other programs for the same work, set up from packages."""
