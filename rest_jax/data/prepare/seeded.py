"""Random choices that depend on a seed and a name alone, never on the order in which records come."""

import hashlib
import random

_MAX = 2**64


def digest(*parts: object) -> int:
    """64 bits that depend on every part; the parts are told apart by their borders."""
    text = "".join(f"{len(part)}:{part}" for part in map(str, parts))
    raw = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")


def draw(seed: int, purpose: str, name: str) -> float:
    """A number in [0, 1), uniform over names."""
    return digest(seed, purpose, name) / _MAX


def generator(seed: int, purpose: str, name: str) -> random.Random:
    """A generator of its own for each name."""
    return random.Random(digest(seed, purpose, name))
