"""What a bundle costs and gives on this machine: accuracy, latency, energy, and what the machine has and lacks."""
