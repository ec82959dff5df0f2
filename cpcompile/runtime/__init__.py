"""Run the engines of a bundle with ONNX Runtime and without torch; `plan`, which runs TensorRT plans, needs torch.

bundle = open_bundle("model.cpc")
engine = load_engine(bundle, "english")
logits = engine.run(input_ids)
"""

from cpcompile.runtime.engine import Engine, load_engine

__all__ = ["Engine", "load_engine"]
