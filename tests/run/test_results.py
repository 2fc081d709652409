"""Results of benchmarks in the folder of a run: which checkpoint each is of."""

from rest_jax.evaluation import benchmark
from rest_jax.files import as_path
from rest_jax.run.results import checkpoint_digest, steps_of_results


def test_a_result_names_the_checkpoint_as_evaluate_does(tmp_run, monkeypatch):
    paths = {step: as_path(tmp_run / "checkpoints" / str(step)) for step in (1, 2)}
    for step, path in paths.items():
        (path / "params").mkdir(parents=True)
        (path / "manifest.json").write_text(f'{{"params/a": [{step}, "b", 3]}}')
    (tmp_run / "checkpoints" / "3").mkdir()  # without a manifest
    monkeypatch.setattr(benchmark, "is_run", lambda _: True)
    monkeypatch.setattr(
        benchmark.checkpoint, "newest_params", lambda source: (as_path(source) / "params", 0)
    )
    digests = {benchmark.checkpoint_digest(str(path), None): step for step, path in paths.items()}  # type: ignore[arg-type]
    assert digests == steps_of_results(tmp_run)
    assert checkpoint_digest(paths[2]) in digests and len(digests) == 2
