"""Graph passes on onnx_ir: one file, one class, one rewrite each."""
