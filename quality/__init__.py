"""What FP8 costs in pictures: the gate that FP8 engines must pass, and the report about them."""
