"""A web page and service that classifies uploaded images."""
