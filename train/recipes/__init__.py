"""Recipes: each module has a function `config()` that returns a `RunConfig`."""
