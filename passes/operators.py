"""Sets of operators of the ONNX standard."""

from __future__ import annotations

import onnx_ir as ir


def is_standard(node: ir.Node) -> bool:
    """Whether the operator is one of the ONNX standard."""
    return node.domain in ("", "ai.onnx")


RANDOM = (
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"),
)
"""Operators whose result can differ every time."""

ZERO_AT_ZERO = (
    *("Abs", "Asin", "Asinh", "Atan", "Atanh", "Cast", "Ceil", "Elu", "Erf", "Floor", "Gelu", "HardSwish", "Identity"),
    *("LeakyRelu", "Mish", "Neg", "Relu", "Round", "Selu", "Sign", "Sin", "Sinh", "Softsign", "Sqrt", "Swish", "Tan"),
    *("Tanh", "ThresholdedRelu"),
)
"""Elementwise operators of one operand that map 0 to 0."""
NOT_ZERO_AT_ZERO = (
    *("Cos", "Cosh", "Exp", "HardSigmoid", "IsInf", "IsNaN", "Log", "Not", "Reciprocal", "Sigmoid", "Softplus"),
)
"""Elementwise operators of one operand that map 0 to another value."""
ELEMENTWISE = (
    *("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod"),
    *("Mul", "Or", "Pow", "PRelu", "Sub", "Sum", "Where", "Xor"),
)
"""Elementwise operators of several operands, which are broadcast to a common shape."""

REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"),
    *("ReduceSum", "ReduceSumSquare"),
)
