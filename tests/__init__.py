"""The tests, laid out as the package is; a package so that they share `tests.archives`."""
