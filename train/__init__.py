"""The trainer: recipes, data, a sharded loop and sealed checkpoints; run from a checkout as `python -m train`."""
