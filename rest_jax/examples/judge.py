"""A reward model or a judge behind a URL that speaks OpenAI's protocol: NAME.py:score. Standard library only.

    export JUDGE_URL=http://127.0.0.1:8000/v1 JUDGE_MODEL=judge JUDGE_API_KEY=... JUDGE_CACHE=judged
    rest-jax train FILES... reward.plugin=NAME.py:score reward.plugin_timeout=40 reward.plugin_workers=32 \\
        'reward.plugin_env=[JUDGE_URL,JUDGE_MODEL,JUDGE_API_KEY,JUDGE_CACHE]'

Workers inherit no variables but those that `reward.plugin_env` names. Each waits for one reply at a time, so `plugin_workers` is
the number of requests under way, of each process of the run. `plugin_timeout` must be above TIMEOUT x TRIES: a completion whose
judge does not answer then fails for that reason, and its worker stays.

The same question is not always answered alike, not even at temperature 0 (a server's batches differ). JUDGE_CACHE, a folder
that all hosts share, keeps every reply: what was judged once stays so, and a run that is resumed gets the rewards it had.
"""

import hashlib
import json
import os
import pathlib
import re
import time
import urllib.error
import urllib.request

TIMEOUT, TRIES = 12.0, 3  # seconds of a request; requests for one reply
SCALE = 0.1  # a mark of 10 is worth a reward of 1
PROMPT = """You mark what an assistant with tools has written, from 0 (useless) to 10 (perfect).
What it was asked:
{history}
A right answer:
{target}
What it wrote:
{text}
Reply with the mark alone."""


def score(completion: dict, text: str, record: dict, target: dict) -> dict[str, float]:
    """The mark of a completion, scaled."""
    history = "\n".join(f"{turn['role']}: {turn['content']}" for turn in record["history"])
    gold = json.dumps({"calls": target["calls"], "response": target["response"]})
    prompt = PROMPT.format(history=history, target=gold, text=text)
    return {"judge": SCALE * read_mark(reply_to(prompt))}


def read_mark(reply: str) -> float:
    """The number in a reply. ValueError where there is none from 0 to 10."""
    found = re.search(r"\d+(?:\.\d+)?", reply)
    if found is None or not 0 <= float(found[0]) <= 10:
        raise ValueError(f"no mark in the reply {reply[:80]!r}")
    return float(found[0])


def reply_to(prompt: str) -> str:
    """What the judge says, or has said before."""
    model, folder = os.environ.get("JUDGE_MODEL", "judge"), os.environ.get("JUDGE_CACHE")
    if folder is None:
        return ask(prompt, model)
    kept = pathlib.Path(folder, hashlib.sha256(f"{model}\n{prompt}".encode()).hexdigest())
    if kept.exists():
        return kept.read_text(encoding="utf-8")
    reply = ask(prompt, model)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(reply, encoding="utf-8")
    os.replace(partial, kept)  # never half a reply, however many workers write
    return reply


def ask(prompt: str, model: str) -> str:
    """One reply; a server that is busy or away is asked again."""
    question = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "seed": 0,
        "max_tokens": 16,
    }
    key = os.environ.get(
        "JUDGE_API_KEY", ""
    ).strip()  # a line end would be quoted by the error of its header
    request = urllib.request.Request(
        f"{os.environ['JUDGE_URL'].rstrip('/')}/chat/completions",
        json.dumps(question).encode(),
        {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
    )
    for left in reversed(range(TRIES)):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return json.load(answer)["choices"][0]["message"]["content"]
        except (OSError, urllib.error.HTTPError) as error:
            said = getattr(error, "code", 0)
            if not left or (said and said != 429 and said < 500):
                raise
            time.sleep(0.2 * (TRIES - left))
    raise AssertionError
