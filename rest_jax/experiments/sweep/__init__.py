"""Sweeps: Optuna draws config values, every trial is an ordinary run, many workers on many machines share one study.

space.py    SPACE.yaml as records, checked against the config; a point of it as a run's config
study.py    the Optuna study: storage, sampler, pruner
queue.py    which trial a worker takes next; what becomes of the trials of workers that died
worker.py   the loop of a worker: take a trial, run it, watch its held-out metric, tell Optuna
process.py, child.py    the process of one trial; several workers on one machine
results.py, pictures.py    table, CSV and plots of a study
"""

from rest_jax.experiments.sweep.command import run

__all__ = ["run"]
