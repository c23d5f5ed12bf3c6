"""What the host agent and the guest agent must agree on, and nothing else."""
