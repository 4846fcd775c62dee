"""Runs the application until it is interrupted."""

import contextlib
import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from inception_jax.errors import UserError

# Connections at a time, each with a picture at most in memory; more are told to come again (503).
_MAX_CONNECTIONS = 40


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound, and does not take connections yet.

    Args:
      host: name or address of this machine.
      port: 0: any that is free.

    Raises:
      UserError: if it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
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
      bound: where.
      ready: called once requests are taken.
    """
    # "error": a request that breaks off is no news to the user.
    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=5,
    )
    # uvicorn ends in order, and then raises the signal again.
    with contextlib.suppress(KeyboardInterrupt):
        _Server(config, ready).run(sockets=[bound])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()
