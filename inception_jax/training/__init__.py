"""How a model is trained: losses and metrics, learning rate and update rule, the jitted step, the
state with its checkpoints, and the loop that drives them.
"""
