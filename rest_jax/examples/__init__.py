"""Files to begin a plug-in with: `rest-jax new KIND NAME` writes NAME.py and test_NAME.py (docs/plugins.md).

They are the files of this folder, in which NAME stands for the name.
"""

import keyword
import pathlib
import sys
from typing import Literal, get_args

from rest_jax.errors import UserError

Kind = Literal["reward", "judge", "weight", "advantage", "loss"]

# The words of `rest-jax train` that use one.
USES: dict[Kind, str] = {
    "reward": "reward.plugin=NAME.py:score",
    "judge": "reward.plugin=NAME.py:score reward.plugin_env=[JUDGE_URL,JUDGE_MODEL,JUDGE_API_KEY,JUDGE_CACHE] "
    "reward.plugin_timeout=40 reward.plugin_workers=32",
    "weight": "weights.plugin=NAME.py",
    "advantage": "loss.advantage_plugin=NAME.py",
    "loss": "loss.policy_plugin=NAME.py",
}
assert set(USES) == set(get_args(Kind))


def write_new(kind: Kind, name: str, folder: pathlib.Path) -> str:
    """Writes the two files, and returns what to do with them. UserError for a name that no module can have, and where one of the
    files exists.
    """
    if not name.isidentifier():
        raise UserError(f"new {kind} {name}: a name of letters, digits and _ is needed")
    if keyword.iskeyword(name) or name in sys.stdlib_module_names:
        raise UserError(f"new {kind} {name}: Python has that name for itself; choose another")
    here = pathlib.Path(__file__).parent
    files = {folder / f"{prefix}{name}.py": here / f"{prefix}{kind}.py" for prefix in ("", "test_")}
    if found := [path for path in files if path.exists()]:
        raise UserError(f"{found[0]}: exists, and is not overwritten; choose another name")
    for path, source in files.items():
        path.write_text(source.read_text(encoding="utf-8").replace("NAME", name), encoding="utf-8")
    first, second = files
    return (
        f"wrote {first} and {second}\ntry:  python -m pytest {second}  (pip install pytest)\n"
        f"use:  rest-jax train FILES... {USES[kind].replace('NAME', name)}"
    )
