"""Computes a checksum per image, verified whenever an image is read.

64-bit XXH3: a changed image goes undetected once in 2 ** 64 times, and a 64 × 64 image takes 0.3
µs. It detects damage, not tampering.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import xxhash

# Typed this way because type checkers do not accept arrays as buffers before Python 3.12.
_digest: Callable[[Any], int] = xxhash.xxh3_64_intdigest


def of_images(images: np.ndarray) -> np.ndarray:
    """Returns the checksums of images, uint8 [N, …], as uint64 [N]."""
    rows = np.ascontiguousarray(images).reshape(len(images), -1)
    return np.fromiter(map(_digest, rows), np.uint64, len(rows))


def of_file(content: bytes) -> int:
    """Returns the checksum of an encoded image."""
    return _digest(content)
