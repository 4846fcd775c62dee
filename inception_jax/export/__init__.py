"""Networks in the formats of other programs: StableHLO, ONNX and files of weights."""
