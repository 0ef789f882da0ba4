"""What engines will need and how fast they could be, computed from their ONNX graphs."""
