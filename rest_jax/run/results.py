"""Results of benchmarks that `rest-jax evaluate RUN --benchmark NAME` left in the folder of a run, for model card and page.

read_results(run)          those of the folder, by the names of their files; JSON files that are no results are passed over
checkpoint_digest(path)    what a result has of the checkpoint that it is of: a run may have trained on since
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Annotated

import pydantic
from etils import epath

from rest_jax.files import Location, as_path, fingerprints, store_errors
from rest_jax.run import checkpoint


class Rate(pydantic.BaseModel):
    """A rate and its 95 % interval, from 0 to 1, of `count` items; None for a figure made of the rates of categories."""

    count: pydantic.NonNegativeInt | None = None
    rate: pydantic.FiniteFloat
    low: pydantic.FiniteFloat
    high: pydantic.FiniteFloat

    @property
    def interval(self) -> str:
        return f"{self.low:.1%} to {self.high:.1%}"


Groups = Annotated[dict[str, Rate], pydantic.Field(min_length=1)]


class Result(pydantic.BaseModel):
    """What is shown of a result file: `version` is that of rest_jax; `release` is of the package that judged, which for BFCL is
    the bare number (None: rest_jax judged).
    """

    benchmark: str
    checkpoint_sha256: str = ""  # `checkpoint_digest`
    version: str = ""
    release: str | None = None
    rates: dict[str, Groups]  # by score and group
    figures: dict[str, Rate | None] = {}  # of BFCL; None where categories were not asked

    @property
    def harness(self) -> str:
        """What judged: "rest_jax", or a package with its version."""
        if self.release is None:
            return "rest_jax"
        package, _, number = self.release.rpartition("==")
        return f"{package or 'bfcl-eval'} {number}"

    def lines(self) -> Iterator[tuple[str, str, Rate]]:
        """(score, group, rate) of all rates, then ("figure", name, rate) of the figures that are known."""
        for score, groups in self.rates.items():
            yield from ((score, group, rate) for group, rate in groups.items())
        yield from (("figure", name, rate) for name, rate in self.figures.items() if rate)


def read_results(run: Location) -> dict[str, Result]:
    """{file name: result} of the folder. A JSON file that is broken, or of another form, is left out."""
    found = {}
    folder = as_path(run)
    with store_errors(folder):
        for file in sorted(folder.glob("*.json")):
            if file.is_file():
                try:
                    found[file.name] = Result.model_validate_json(file.read_bytes())
                except pydantic.ValidationError:
                    continue
    return found


def checkpoint_digest(path: epath.Path) -> str:
    """That of the checkpoint of a run, whose manifest has the digest of every file."""
    return files_digest(path, [checkpoint.MANIFEST])


def files_digest(folder: Location, names: Sequence[str]) -> str:
    """SHA-256, in hex, over the digests of files of a folder: of the model that a result is of."""
    return hashlib.sha256(json.dumps(fingerprints(folder, names)).encode()).hexdigest()


def steps_of_results(run: Location) -> dict[str, int]:
    """The steps of the checkpoints that are kept, by `checkpoint_digest`."""
    folder = as_path(run) / checkpoint.FOLDER
    with store_errors(folder):
        paths = [folder / str(step) for step in checkpoint.list_steps(folder)]
        found = [path for path in paths if (path / checkpoint.MANIFEST).is_file()]
        return {checkpoint_digest(path): int(path.name) for path in found}
