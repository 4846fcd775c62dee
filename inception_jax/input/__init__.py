"""How examples reach the devices.

The batch of each step as a function of that step, crops on the host, augmentation on the device.
"""
