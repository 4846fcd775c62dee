"""Evaluates models exactly, and keeps their predictions for each example."""
