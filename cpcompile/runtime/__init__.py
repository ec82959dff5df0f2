"""Run the engines of a bundle in ONNX Runtime or OpenVINO, without torch, which only `plan` for TensorRT plans needs.

engine = load("model.cpc", context="english")
engine.generate("Return the ", max_new_tokens=40)       text in, text out

engine = load_engine("model.cpc", "english")            arrays in, arrays out, for any model
logits = engine.run(input_ids)
"""

from cpcompile.runtime.engine import Engine, load_engine
from cpcompile.runtime.engines import Engines, load_all
from cpcompile.runtime.text_engine import Score, TextEngine, load

__all__ = ["Engine", "Engines", "Score", "TextEngine", "load", "load_all", "load_engine"]
