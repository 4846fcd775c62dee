"""A web page and an API around a trained network; needs the extra `serve`."""
