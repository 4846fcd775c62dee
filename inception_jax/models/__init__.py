"""The networks: pure functions of parameters and images, independent of data and mesh axes."""
