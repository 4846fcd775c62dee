"""What a trained model is worth: exact evaluation, prediction and plots.

Evaluation counts every example once; plots are drawn from the files of a run, never from memory.
"""
