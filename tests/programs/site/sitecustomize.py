"""Hides PyTorch, which few users of this package have and only the tests need, from the programs that tests start:
transformers imports it wherever it finds it, which is a second of every start.
"""

import importlib.util

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
