"""TensorRT plans: built in a process of their own, refitted, their failures explained."""
