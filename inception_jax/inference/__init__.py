"""Inference with trained networks: predictions on image files, heat maps, and a web service."""
