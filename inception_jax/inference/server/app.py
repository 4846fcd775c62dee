"""The web page and API as a Starlette application.

Routes::

  GET /         the page, one self-contained file.
  GET /model    JSON: network, classes, preparation, layer, limits.
  POST /predict the body is the image file. ?top=N returns N classes, ?label=K explains class K
                instead of the best, ?heat_map=0 omits the heat map. JSON: guesses (label, name,
                probability; best first) and, with a heat map, explained (the class it is for),
                picture and heat_map (PNGs as data URLs). Errors: JSON with error, and status 400
                (not an image, an invalid parameter), 413 (too large) or 415 (a form instead of
                the file).
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from inception_jax.errors import UserError
from inception_jax.inference.server.classify import (
    Limits,
    PredictionService,
    TooLargeError,
    file_too_large,
)

_PAGE = pathlib.Path(__file__).with_name("page.html")

# Makes the browser enforce that the page loads nothing from other sites and cannot be framed.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def create_app(service: PredictionService) -> Starlette:
    """Returns the application.

    Args:
      service: answers the requests; already warmed up.
    """
    page, model_info = _PAGE.read_text(encoding="utf-8"), service.model_info()

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page, headers=_HEADERS)

    async def show_model(request: Request) -> Response:
        return JSONResponse(model_info, headers=_HEADERS)

    async def predict(request: Request) -> Response:
        try:
            if request.headers.get("content-type", "").startswith("multipart/"):
                return _error_response(415, "Send the image file itself: curl --data-binary @FILE")
            settings = _parse_query(request.query_params)
            data = await _read_body(request, service.limits)
            answer = await run_in_threadpool(service.classify, data, **settings)
        except ClientDisconnect:
            return Response(status_code=400)  # Nobody reads it.
        except TooLargeError as error:
            return _error_response(413, str(error))
        except UserError as error:
            return _error_response(400, str(error))
        return JSONResponse(answer, headers=_HEADERS)

    return Starlette(
        routes=[
            Route("/", show_page),
            Route("/model", show_model),
            Route("/predict", predict, methods=["POST"]),
        ]
    )


def _error_response(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status_code=status, headers=_HEADERS)


def _parse_query(query: Mapping[str, str]) -> dict[str, Any]:
    """Returns the keyword arguments of `PredictionService.classify`.

    Raises:
      UserError: if a parameter is unknown or out of range.
    """
    known = {"top": "5", "label": "0", "heat_map": "1"}
    for name, value in query.items():
        if name not in known:
            raise UserError(f"{name}: no such parameter; use {', '.join(known)}")
        if not (value.isdecimal() and len(value) < 10):
            raise UserError(f"{name} = {value!r}: must be a whole number, such as {known[name]}")
    return {
        "top": max(1, int(query.get("top", 5))),
        "label": int(query["label"]) if "label" in query else None,
        "heat_map": query.get("heat_map") != "0",
    }


async def _read_body(request: Request, limits: Limits) -> bytes:
    """Returns the body, reading no more than the limit.

    Raises:
      TooLargeError: if it is larger.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limits.bytes:
            raise file_too_large(limits)
    return bytes(body)
