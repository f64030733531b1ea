"""Checkpoints to disk: containers, encodings, names, and files that appear whole or not at all.

For `convert.py`. The mirror of `loaders`: it knows formats and nothing of the engine, and what it
writes it is handed tensor by tensor, so that no model is ever in memory whole. Formulas stand here
a second time, turned around, rather than be shared with the loaders: a mistake in one of them
then shows when the other reads the file.
"""
