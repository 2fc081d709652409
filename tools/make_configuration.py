"""Writes docs/configuration.md, the page of every key of a config: python tools/make_configuration.py"""

import argparse
import pathlib

from rest_jax.schema import reference

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # it takes no words
    page = pathlib.Path(__file__).parent.parent / "docs" / "configuration.md"
    page.write_text(reference(), encoding="utf-8")
    print(page)
