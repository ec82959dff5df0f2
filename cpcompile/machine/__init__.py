"""The machine: memory, GPUs, interference, versions, and measurements in a fresh process."""
