"""What a person sees of host agents, guests, commands and brokers: `vmctl monitor`, and the same in `vmctl top`."""
