"""What TensorRT's ONNX parser reads: operators, the element types of their data, and their conditions.

From the support table of the parser (onnx/onnx-tensorrt, docs/operators.md of 10.15) and its changelog. The
oldest version that is built for is 10.13, so what came later is not here: Attention (10.14), RotaryEmbedding,
RMSNormalization and TensorScatter (10.15), Swish (11.0). Nor are operators with graphs inside them (If, Loop,
Scan), which the rules of `engines.checks.graph_rules` do not look into.
"""

OPSETS = range(9, 21)  # that every version from 10.1 on reads; 10.15 goes to 24, 11 to 25

_FLOATS = "FLOAT FLOAT16 BFLOAT16"
_NUMBERS = f"{_FLOATS} INT32 INT64"
_ALL = f"{_NUMBERS} BOOL"

_OPERATORS = {
    "FLOAT FLOAT16": "DeformConv GridSample Mish NonMaxSuppression NonZero RoiAlign",
    _FLOATS: """
        Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv
        ConvTranspose Cos Cosh CumSum Dropout Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool
        GlobalLpPool GlobalMaxPool GroupNormalization HardSigmoid HardSwish Hardmax
        InstanceNormalization IsInf LRN LSTM LayerNormalization LeakyRelu Log LogSoftmax
        LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization PRelu QuantizeLinear
        DequantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike
        Reciprocal Resize Round Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh
        ThresholdedRelu Upsample
        """,
    _NUMBERS: """
        Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual
        Max Mean Min Mod Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
        ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Scatter
        ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK
        """,
    f"{_NUMBERS} INT8": "Gelu",
    _ALL: """
        Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity OneHot Reshape
        ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where
        """,
    f"{_ALL} UINT8": "Cast CastLike",
    f"{_ALL} FLOAT8E4M3FN": "Constant ConstantOfShape",
    "BOOL": "And Not Or Xor",
}
# Operator → the element types that its data may have. Indices, axes and what Q and DQ store are not its data.
TYPES: dict[str, frozenset[str]] = {
    operator: frozenset(types.split()) for types, names in _OPERATORS.items() for operator in names.split()
}

# Operator → its input that must be known when the engine is built.
BUILD_TIME_INPUTS = {
    **dict.fromkeys(["Squeeze", "Unsqueeze", "CumSum", "OneHot"], 1),
    **dict.fromkeys([name for name in TYPES if name.startswith("Reduce")], 1),
    **dict.fromkeys(["Pad", "Slice"], 3),
}

# Operator → attribute → the values that the parser takes; the first is ONNX's default.
ATTRIBUTES: dict[str, dict[str, tuple[object, ...]]] = {
    "Resize": {
        "antialias": (0,),
        "coordinate_transformation_mode": (
            *("half_pixel", "asymmetric", "align_corners"),
            *("pytorch_half_pixel", "tf_half_pixel_for_nn"),
        ),
        "keep_aspect_ratio_policy": ("stretch",),
        "mode": ("nearest", "linear"),
        "nearest_mode": ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"),
    },
    "ScatterND": {"reduction": ("none",)},
    "TopK": {"sorted": (1,)},
}
