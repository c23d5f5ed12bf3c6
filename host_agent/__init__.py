"""The volunteer's host: the wrapper, the agent that drives virtual machines, and the people's tools."""

__version__ = "0.1.0"
