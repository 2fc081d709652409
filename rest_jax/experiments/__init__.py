"""Experiments: many runs from one command. Optuna keeps the trials; each trial is an ordinary run in its own process.

search.py    a sweep: config values drawn by grid, random or TPE
compare.py   a comparison: methods x seeds, with paired intervals and a page (results.py, figures.py, page.md.jinja)
storage.py   the Optuna study in SQLite or PostgreSQL: its queue of trials, heartbeats, retries
worker.py    takes trials from a study, starts each run, reports its metric, prunes it
"""
