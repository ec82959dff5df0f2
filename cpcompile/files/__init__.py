"""Files: whole or not at all, ONNX files, their external data."""
