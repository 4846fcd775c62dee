"""Trained networks in use: predictions on image files, heat maps, and a web service."""
