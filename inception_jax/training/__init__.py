"""How a model is trained.

The objective, the learning rate and the update rule, the jitted step, the state with its
checkpoints, and the loop that drives them.
"""
