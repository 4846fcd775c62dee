"""Trains a model: objective, schedule, optimizer, jitted step, state, checkpoints and the loop."""
