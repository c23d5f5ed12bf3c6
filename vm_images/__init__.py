"""Recipes of guest images and the builder that makes them."""
