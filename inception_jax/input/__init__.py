"""How examples reach the devices.

Images kept decoded or as records, the batch of each step as a function of that step, augmentation
on the device, and the sharding of a batch over processes and devices.
"""
