"""Tests the web service over HTTP, in this process."""

import asyncio
import base64
import io
import pathlib
import struct
import zlib
from concurrent import futures
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from inception_jax.inference import gradcam
from inception_jax.inference.gradcam import VIEW_SIZE, Explainer
from inception_jax.inference.predictor import Predictor
from inception_jax.inference.server.classify import Limits, PredictionService
from tests import small

testclient = pytest.importorskip("starlette.testclient", reason="needs the extra 'serve'")

LIMITS = Limits(bytes=50_000, pixels=40_000)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(small.weights(), batch_size=1)


@pytest.fixture(scope="module")
def client(predictor: Predictor) -> Any:
    from inception_jax.inference.server.app import create_app

    service = PredictionService(predictor, Explainer(predictor), LIMITS)
    service.warm_up()
    return testclient.TestClient(create_app(service))


def random_image(seed: int = 0) -> np.ndarray:
    """Returns 8 × 8 pixels, which need no resizing."""
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)


def decoded(url: str) -> np.ndarray:
    kind, _, data = url.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_predict_returns_classes_and_heat_map(client: Any, predictor: Predictor) -> None:
    data = gradcam.encode_png(random_image())
    answer = client.post("/predict", content=data)
    assert answer.status_code == 200
    result = answer.json()
    (expected,) = predictor.predict(random_image()[None])
    assert [guess["label"] for guess in result["guesses"]] == [guess.label for guess in expected]
    assert result["guesses"][0]["name"] == expected[0].name
    assert result["guesses"][0]["probability"] == pytest.approx(expected[0].probability)
    assert result["explained"] == result["guesses"][0]
    view = predictor.view(data, "x", VIEW_SIZE)
    np.testing.assert_array_equal(decoded(result["picture"]), view)
    heat = Explainer(predictor).maps(random_image()[None], np.array([expected[0].label]))[0]
    np.testing.assert_array_equal(decoded(result["heat_map"]), gradcam.overlay(view, heat))


def test_another_class_can_be_explained(client: Any) -> None:
    data = gradcam.encode_png(random_image())
    first = client.post("/predict?top=2", content=data).json()
    assert len(first["guesses"]) == 2
    other = first["guesses"][1]
    second = client.post(f"/predict?label={other['label']}", content=data).json()
    assert second["explained"] == other
    assert second["guesses"][:2] == first["guesses"]
    assert second["heat_map"] != first["heat_map"]
    assert set(client.post("/predict?heat_map=0", content=data).json()) == {"guesses"}


def test_model_is_described(client: Any) -> None:
    model_info = client.get("/model").json()
    assert model_info["classes"][3] == "kind 3"
    assert model_info["network"].startswith("mini_googlenet, 10 classes")
    assert model_info["preparation"] == "the center square, resized to 8 × 8 px"
    assert model_info["limits"] == {"bytes": 50_000, "pixels": 40_000}
    assert model_info["layer"] == "inception_4b"


def test_page_is_self_contained(client: Any) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "http" not in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy


def huge_png() -> bytes:
    """Returns a PNG whose header claims 30,000 × 30,000 pixels, but that has none."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR" + header) + chunk(b"IDAT" + zlib.compress(b""))


def chunk(content: bytes) -> bytes:
    length = struct.pack(">I", len(content) - 4)
    return length + content + struct.pack(">I", zlib.crc32(content))


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"", 400, "The image cannot be read: empty file. Download"),
        (b"a text", 400, "The image cannot be read: text. Remove it"),
        (gradcam.encode_png(random_image())[:80], 400, "The image cannot be read: "),
        (bytes(50_001), 413, "The file is too large: the limit is 0.05 MB"),
        (
            gradcam.encode_png(np.zeros((201, 200, 3), np.uint8)),
            413,
            "The image has 200 × 201 pixels",
        ),
        (huge_png(), 413, "The image has more than 90 megapixels"),
    ],
    ids=["empty", "text", "cut", "bytes", "pixels", "bomb"],
)
def test_invalid_file_is_rejected_with_reason(
    client: Any, data: bytes, status: int, message: str
) -> None:
    answer = client.post("/predict", content=data)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"].startswith(message)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("top=no", "top = 'no': must be a whole number"),
        ("label=10", "label = 10: must be less than 10"),
        ("class=3", "class: no such parameter; use top, label, heat_map"),
    ],
)
def test_invalid_parameter_is_rejected(client: Any, query: str, message: str) -> None:
    answer = client.post(f"/predict?{query}", content=gradcam.encode_png(random_image()))
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(message)


def test_form_upload_is_rejected(client: Any) -> None:
    answer = client.post("/predict", content=b"x", headers={"content-type": "multipart/form-data"})
    assert answer.status_code == 415
    assert "--data-binary @FILE" in answer.json()["error"]
    assert client.get("/predict").status_code == 405
    assert client.get("/elsewhere").status_code == 404


def test_body_without_length_is_limited(client: Any) -> None:
    answer = client.post("/predict", content=(bytes(10_000) for _ in range(1000)))
    assert answer.status_code == 413


def test_aborted_upload_is_no_error(predictor: Predictor) -> None:
    from inception_jax.inference.server.app import create_app

    messages = [{"type": "http.request", "body": b"x", "more_body": True}]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    app = create_app(PredictionService(predictor, Explainer(predictor), LIMITS))
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/predict",
        "headers": [],
        "query_string": b"",
    }
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 400


def test_concurrent_requests_get_their_own_answers(client: Any, predictor: Predictor) -> None:
    def ask(seed: int) -> list[float]:
        answer = client.post("/predict?top=10", content=gradcam.encode_png(random_image(seed)))
        return [guess["probability"] for guess in answer.json()["guesses"]]

    with futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(24)))
    for seed, probabilities in enumerate(answers):
        (expected,) = predictor.predict(random_image(seed)[None], 10)
        assert probabilities == pytest.approx([guess.probability for guess in expected])


def test_exif_orientation_is_applied(client: Any, tmp_path: pathlib.Path) -> None:
    turned = Image.fromarray(random_image()).rotate(90)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    turned.save(buffer, format="PNG", exif=exif)
    upright = client.post("/predict?heat_map=0", content=gradcam.encode_png(random_image())).json()
    assert client.post("/predict?heat_map=0", content=buffer.getvalue()).json() == upright
