"""Spectral densities by Papyan's methods, under the path scripts import them from."""
