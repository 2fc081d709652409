"""What is measured of checkpoints, at a tiny size."""

import json

import pytest

from benchmarks import verifying


def test_a_save_is_timed_and_verified(tmp_path, capsys):
    words = ["--megabytes", "1", "--repeats", "1", "--folder", str(tmp_path)]
    assert verifying.main(words) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["benchmark"] == "verifying" and line["saves"] == 1 and line["megabytes"] > 0.5
    assert (
        line["verify_s"] > 0 and line["verify_over_write_s"] == line["verify_s"] / line["write_s"]
    )
    assert not any(tmp_path.iterdir())


def test_wrong_arguments_are_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        verifying.main(["--repeats", "0"])
    assert caught.value.code == 2 and "--repeats" in capsys.readouterr().err
