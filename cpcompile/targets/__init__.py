"""GPU targets: what a command line can request, and what a TensorRT plan records about itself."""
