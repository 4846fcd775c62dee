"""A local web page that says what is in pictures."""

from collections.abc import Sequence

from absl import flags

from inception_jax import cli, console
from inception_jax.errors import UserError
from inception_jax.runtime import huge_pages

USAGE = """
Serve a local web page: drop, paste, choose or photograph a picture, and see the most probable
classes and what the network looked at.

  python -m inception_jax.tools.serve --workdir DIR
  python -m inception_jax.tools.serve --weights FILE.safetensors --port 8080

It needs the extra: pip install -e '.[serve]'. The page asks for nothing from elsewhere, and
pictures stay on this machine. Ctrl-C ends it. Programs may ask, too:

  curl --data-binary @cat.jpg 'http://127.0.0.1:8000/predict?top=3&heat_map=0'

gives JSON: guesses (label, name, probability) and, without heat_map=0, the guess that is explained
(?label=7 chooses another than the best), picture and heat_map as data URLs; on a mistake error,
with the status 400, 413 or 415. GET /model tells the network, its classes and the limits.

--host=0.0.0.0 lets the whole network in, without any password: do so only where you trust it.
"""

_TRAINED = cli.define_trained()
_LAYER = flags.DEFINE_string(
    "layer",
    "",
    "where to look, such as inception_4e for a finer heat map; the last module if empty",
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen at; this machine's own alone")
_PORT = flags.DEFINE_integer("port", 8000, "port to listen at; 0: any that is free", 0, 65535)
_MEGABYTES = flags.DEFINE_float("max_megabytes", 20, "largest picture file", 0.001, 1000)
_MEGAPIXELS = flags.DEFINE_float("max_megapixels", 50, "largest picture", 0.001, 89)
_PLATFORM = cli.define_platform()


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    cli.refuse_positional(positional)
    try:
        from inception_jax.inference.server import app, server
    except ModuleNotFoundError as error:
        raise UserError(
            f"the page needs {error.name}, which is not installed: pip install -e '.[serve]'"
        ) from error
    from inception_jax.inference import load
    from inception_jax.inference.gradcam import Explainer
    from inception_jax.inference.predictor import Predictor
    from inception_jax.inference.server.classify import ImageClassifier, Limits
    from inception_jax.runtime import devices

    with server.bind(_HOST.value, _PORT.value) as bound:
        devices.initialize(platform=_PLATFORM.value, log=console.log)
        weights = load.load(**_TRAINED.values(), log=console.log)
        console.log(f"network: {weights}; compiling")
        predictor = Predictor(weights, batch_size=1)
        limits = Limits(round(1e6 * _MEGABYTES.value), round(1e6 * _MEGAPIXELS.value))
        classifier = ImageClassifier(predictor, Explainer(predictor, _LAYER.value), limits)
        classifier.warm_up()
        host, port = bound.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        server.run(
            app.create_app(classifier),
            bound,
            ready=lambda: print(f"ready: {address} (Ctrl-C ends it)", flush=True),
        )


if __name__ == "__main__":
    huge_pages.use_huge_pages()
    cli.run(main, USAGE)
