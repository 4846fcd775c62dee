# The training command in a container, for a CPU or, with EXTRAS=gcs,tpu, a TPU:
#
#   docker build --tag inception_jax .
#   docker build --tag inception_jax:tpu --build-arg EXTRAS=gcs,tpu .
#   docker run --rm inception_jax --config experiments/digits.py --workdir gs://BUCKET/digits
#
# PYTHON is one of the versions in requirements/, EXTRAS are optional dependencies of
# pyproject.toml, separated by commas.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
ARG PYTHON
ARG EXTRAS=gcs
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/venv
# First the dependencies, with as little of the package as pip needs to know them, so that a change
# of the code does not install them again. The pins also hold for the build's own setuptools.
COPY requirements/python${PYTHON}.txt pins.txt
COPY pyproject.toml LICENSE README.md ./
COPY inception_jax/version.py inception_jax/
RUN pip install --constraint pins.txt setuptools \
    && pip install --constraint pins.txt --no-build-isolation ".[${EXTRAS}]"
COPY inception_jax inception_jax
COPY experiments experiments
RUN pip install --no-deps --no-build-isolation --force-reinstall .

FROM python:${PYTHON}-slim-bookworm
# tini, because Linux ignores signals without a handler in process 1, and JAX's start has none.
# Debian's archive keeps only the newest version of a package, so it cannot be pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 trainer
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# A number, so that Kubernetes can tell that it is not root.
USER 1000
WORKDIR /home/trainer
ENTRYPOINT ["tini", "--", "python", "-m", "inception_jax.main"]
CMD ["--help"]
