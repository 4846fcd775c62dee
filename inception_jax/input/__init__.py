"""How examples reach the devices.

The decoded cache, the batch of each step as a function of that step, augmentation on the device,
and the sharding of a batch over processes and devices.
"""
