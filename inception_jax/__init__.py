"""inception_jax: training the GoogLeNet family (Inception v1) with JAX and Flax."""

__version__ = "0.1.0"
