"""The quickstart's own care for its folder; `test_cli` has it to its end."""

import filelock
import pytest

from rest_jax import quickstart
from rest_jax.errors import UserError
from rest_jax.run.lock import FILE


@pytest.fixture
def words(tmp_path):
    """A run in `tmp_path / "runs" / "mine"`, of which there is a line of metrics, and a file of another kind."""
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    for name in (FILE, "metrics.jsonl", "notes.txt"):
        (folder / name).write_text("")
    return [f"output={folder.parent}", "name=mine"], folder


def test_a_run_that_goes_on_is_not_forgotten(words, monkeypatch):
    overrides, folder = words
    monkeypatch.setattr(quickstart, "convert", lambda *_: pytest.fail("converted"))
    before = sorted(folder.iterdir())
    with (
        filelock.FileLock(folder / FILE),
        pytest.raises(UserError, match="another process trains this run"),
    ):
        quickstart.quickstart(overrides, fresh=True)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("fresh", [False, True])
def test_fresh_leaves_to_training_what_to_forget(words, monkeypatch, fresh):
    overrides, folder = words
    (folder / "converted").mkdir()
    made, asked = [], {}
    monkeypatch.setattr(quickstart, "convert", lambda _, out: made.append(out))
    monkeypatch.setattr(
        quickstart.train, "train", lambda _, restart: asked.update(restart=restart) or 75
    )
    assert quickstart.quickstart(overrides, fresh) == 75
    assert asked == {"restart": fresh} and made == ([folder / "converted"] if fresh else [])
    assert (folder / "notes.txt").exists() and (folder / FILE).exists()
