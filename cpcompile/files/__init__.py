"""Files that are written whole or not at all, ONNX files, and their external data."""
