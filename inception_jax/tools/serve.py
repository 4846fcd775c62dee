"""Serves a local web page that classifies images."""

from inception_jax.runtime import huge_pages

if __name__ == "__main__":
    huge_pages.use_huge_pages()  # Restarts; the imports below are the new process's.

from collections.abc import Sequence

from absl import flags

from inception_jax import cli, console
from inception_jax.errors import UserError

USAGE = """
Serve a local web page that classifies images.

  python -m inception_jax.tools.serve --workdir DIR
  python -m inception_jax.tools.serve --weights FILE.safetensors --port 8080

Drop, paste, choose or photograph an image to see its most probable classes and what the network
looked at. The page loads nothing from other sites, and images stay on this machine. Press Ctrl-C to
stop. Requires the extra: pip install -e '.[serve]'. Programs can send requests, too:

  curl --data-binary @cat.jpg 'http://127.0.0.1:8000/predict?top=3&heat_map=0'

returns JSON: guesses (label, name, probability) and, without heat_map=0, the class explained
(?label=7 selects another than the best) with picture and heat_map as data URLs. On failure: error,
with status 400, 413 or 415. GET /model describes the network, its classes and the limits.

--host=0.0.0.0 accepts connections from other machines without a password: use it only on a network
that you trust.
"""

_TRAINED = cli.define_trained()
_LAYER = flags.DEFINE_string(
    "layer",
    "",
    "layer to explain, such as inception_4e for a finer heat map; empty: the last module",
)
_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "address to listen on; 127.0.0.1 accepts only this machine"
)
_PORT = flags.DEFINE_integer("port", 8000, "port to listen on; 0: any free port", 0, 65535)
_MEGABYTES = flags.DEFINE_float(
    "max_megabytes", 20, "largest image file to accept, in megabytes", 0.001, 1000
)
_MEGAPIXELS = flags.DEFINE_float(
    "max_megapixels", 50, "largest image to accept, in megapixels", 0.001, 89
)
_DTYPE = cli.define_inference_dtype()
_PLATFORM = cli.define_platform()


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    cli.refuse_positional(positional)
    try:
        from inception_jax.inference.server import app, server
    except ModuleNotFoundError as error:
        raise UserError(
            f"the web page needs {error.name}, which is not installed; run "
            "pip install -e '.[serve]'"
        ) from error
    from inception_jax.inference import load
    from inception_jax.inference.gradcam import Explainer
    from inception_jax.inference.predictor import Predictor
    from inception_jax.inference.server.classify import Limits, PredictionService
    from inception_jax.runtime import devices

    with server.bind(_HOST.value, _PORT.value) as bound:
        devices.initialize(platform=_PLATFORM.value, log=console.log)
        weights = load.load(**_TRAINED.values(), log=console.log)
        console.log(f"network: {weights}; compiling")
        weights = load.for_inference(weights, _DTYPE.value, console.log)
        predictor = Predictor(weights, batch_size=1)
        limits = Limits(round(1e6 * _MEGABYTES.value), round(1e6 * _MEGAPIXELS.value))
        service = PredictionService(predictor, Explainer(predictor, _LAYER.value), limits)
        service.warm_up()
        host, port = bound.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        server.run(
            app.create_app(service),
            bound,
            ready=lambda: print(f"ready: {address} (press Ctrl-C to stop)", flush=True),
        )


if __name__ == "__main__":
    cli.run(main, USAGE)
