"""Imports transformers where PyTorch is not installed, as it is for users of this package."""

import tests.programs.site.sitecustomize  # noqa: F401, I001
import transformers

print(f'"{transformers.__version__}"')
