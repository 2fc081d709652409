"""Results of benchmarks in the folder of a run: which checkpoint each is of."""

from rest_jax.files import as_path
from rest_jax.run.results import checkpoint_digest, steps_of_results


def test_results_are_of_the_checkpoints_whose_manifests_they_name(tmp_run):
    paths = {step: as_path(tmp_run / "checkpoints" / str(step)) for step in (1, 2)}
    for step, path in paths.items():
        (path / "params").mkdir(parents=True)
        (path / "manifest.json").write_text(f'{{"params/a": [{step}, "b", 3]}}')
    (tmp_run / "checkpoints" / "3").mkdir()  # without a manifest
    digests = {checkpoint_digest(path): step for step, path in paths.items()}
    assert digests == steps_of_results(tmp_run) and len(digests) == 2
