"""What a trained model is worth: exact evaluation, and what it said of each example.

Evaluation counts every example once, whatever the batch size and devices.
"""
