"""Whether a component's ONNX file is fit for TensorRT and for every profile, told without a GPU."""
