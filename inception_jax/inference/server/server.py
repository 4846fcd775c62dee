"""Runs the web application until it is interrupted."""

import contextlib
import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from inception_jax.errors import UserError

# Concurrent connections, each with at most one image in memory; others get status 503.
_MAX_CONNECTIONS = 40


def bind(host: str, port: int) -> socket.socket:
    """Returns a bound socket that does not accept connections yet.

    Args:
      host: name or address to bind to.
      port: 0: any free port.

    Raises:
      UserError: if it cannot be bound, or the host has no valid name.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except UnicodeError as error:
        raise UserError(f"--host={host}: is not the name or address of a host") from error
    except OSError as error:
        raise UserError(
            f"--host={host} --port={port}: cannot listen: {error.strerror}. Use another --port, or "
            "0 for any free port"
        ) from error
    return bound


def run(app: Starlette, bound: socket.socket, ready: Callable[[], None]) -> None:
    """Serves until the process is interrupted (Ctrl-C).

    Args:
      app: the application.
      bound: the socket to serve on.
      ready: called when requests are accepted.
    """
    # "error": the user need not know about every aborted request.
    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=5,
    )
    # uvicorn shuts down gracefully, then raises the signal again.
    with contextlib.suppress(KeyboardInterrupt):
        _Server(config, ready).run(sockets=[bound])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()
