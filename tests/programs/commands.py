"""Runs several commands of `rest-jax` in this process: in FILE a JSON object {name: [word, ...]}; out, in the same file,
{name: [exit code, what it printed on stdout]}.
"""

import contextlib
import io
import json
import pathlib
import sys

from rest_jax.run import environment

environment.configure()

from rest_jax import cli

file = pathlib.Path(sys.argv[1])
done = {}
for name, words in json.loads(file.read_text()).items():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main(words)
    done[name] = [code, out.getvalue()]
file.write_text(json.dumps(done))
