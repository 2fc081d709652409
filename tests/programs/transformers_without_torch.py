"""Imports transformers where PyTorch is not installed, as it is for users of this package."""

import importlib.util

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)

import transformers

print(f'"{transformers.__version__}"')
