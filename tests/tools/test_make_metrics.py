"""The page of metrics is the table of names, which has all that runs write (tests/run/test_metric_names.py)."""

import re

from rest_jax.run.metrics import METRICS, REGION_NAMES
from tests.conftest import REPOSITORY
from tools.make_metrics import page

PAGE = (REPOSITORY / "docs" / "metrics.md").read_text()


def test_the_page_is_up_to_date():
    assert page() == PAGE, "run python tools/make_metrics.py"


def test_every_name_is_on_it_once_with_its_unit_and_meaning():
    found = re.findall(r"^\| `([\w/]+)` \| (.*?) \| (.+) \|$", PAGE, re.M)
    rows = {}
    for name, unit, meaning in found:
        names = [name.replace("NAME", region) for region in REGION_NAMES]
        for one in names if name.startswith("region/NAME/") else [name]:
            assert one not in rows
            rows[one] = (unit, meaning.replace("&#124;", "|"))
    assert rows == METRICS


def test_metrics_that_other_pages_name_are_on_it():
    prefixes = "|".join(sorted({name.partition("/")[0] for name in METRICS} - {"data"}))
    for file in ("own_reward.md", "methods.md", "method.md", "models.md", "plugins.md", "faq.md"):
        text = (REPOSITORY / "docs" / file).read_text()
        for name in re.findall(rf"`((?:{prefixes})/[a-z_/]*[a-z])`", text):
            assert name in METRICS or name.endswith("_part"), (file, name)
