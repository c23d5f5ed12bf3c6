"""The agent inside a virtual machine: does the commands that its host agent sends through the broker."""

VERSION = "0.1.0"
