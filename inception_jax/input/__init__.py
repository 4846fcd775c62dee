"""The input pipeline: from examples to augmented batches on the devices.

Provides batches as a function of the step number, crops on the host and augmentation on the device.
"""
