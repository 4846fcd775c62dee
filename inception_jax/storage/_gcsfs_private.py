"""Retries of gcsfs; the only module that relies on its private parts.

Private is that all requests pass through `GCSFileSystem._request`, which has a decorator that
repeats it five times, for half a minute.

To raise the pin to a version that is not in `TESTED_WITH`, run test_bucket_checkpoints.py, then add
it here.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import fsspec
import gcsfs

TESTED_WITH = {"gcsfs": ("2026.10.1",)}

_Request = Callable[..., Awaitable[Any]]


def set_retry(retry: Callable[[_Request], _Request]) -> None:
    """Sets how gcsfs repeats failed requests, for file systems that fsspec creates from now on.

    Args:
      retry: maps a function that sends a request once to one that repeats it.
    """
    send_once = gcsfs.GCSFileSystem._request.__wrapped__

    class FileSystem(gcsfs.GCSFileSystem):
        async def _request(self, *arguments: Any, **options: Any) -> Any:
            return await retry(send_once)(self, *arguments, **options)

    for protocol in gcsfs.GCSFileSystem.protocol:
        fsspec.register_implementation(protocol, FileSystem, clobber=True)
