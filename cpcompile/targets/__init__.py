"""What engines for GPUs can be asked for, and what plans say of themselves."""
