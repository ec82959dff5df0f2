"""What a bundle is built from: checkpoints and programs, and their capture as one dynamic graph."""
