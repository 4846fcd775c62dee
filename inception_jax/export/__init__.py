"""Export of trained networks: StableHLO, ONNX and weights files."""
