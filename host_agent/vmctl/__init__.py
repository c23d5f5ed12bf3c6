"""`vmctl`: the commands for people."""
