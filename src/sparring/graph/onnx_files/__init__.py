"""Read a network from an ONNX file, and run a graph as a module."""
