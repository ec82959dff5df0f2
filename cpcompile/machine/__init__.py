"""What this machine is and has: memory, GPUs, noise, versions, and measurements in a fresh process."""
