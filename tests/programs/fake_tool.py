"""Stands in for the program it is called as (gcloud, srun, rest-jax, ...): notes its words, and answers as it is told.

$FAKES is a folder. calls.jsonl gets a line [process id, name, word, ...]. answers.json is a list of [part, answers]: the first
part that occurs in the words, joined by spaces, has the answer, the next one at each call until one is left. An answer may have
`out` and `err` (texts), `seconds` (to take; SIGTERM in them makes it note "saved" and end with 0), `save_seconds` (before that;
another SIGTERM in them makes it note "killed" and end with 143), `run` ("command": the value of --command in a shell; "words":
the words after the options) and `code` (the exit code).
"""

import fcntl
import json
import os
import signal
import sys
import time


def main() -> None:
    name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
    answer = next_answer(" ".join([name, *words]))
    if answer.get("seconds"):
        signal.signal(signal.SIGTERM, lambda *_: save(name, answer.get("save_seconds", 0)))
    note(name, *words)
    sys.stdout.write(answer.get("out", ""))
    sys.stdout.flush()
    sys.stderr.write(answer.get("err", ""))
    time.sleep(answer.get("seconds", 0))
    if answer.get("run") == "command":
        (command,) = (word.partition("=")[2] for word in words if word.startswith("--command="))
        os.execvp("bash", ["bash", "-c", command])
    if answer.get("run") == "words":
        while words[0].startswith("-"):
            words.pop(0)
        os.execvp(words[0], words)
    sys.exit(answer.get("code", 0))


def save(name: str, seconds: float) -> None:
    signal.signal(signal.SIGTERM, lambda *_: (note(name, "killed"), os._exit(143)))
    time.sleep(seconds)
    note(name, "saved")
    os._exit(0)


def next_answer(line: str) -> dict:
    with open(os.path.join(os.environ["FAKES"], "answers.json"), "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        known = json.load(file)
        for part, answers in known:
            if part in line:
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                file.seek(0)
                file.truncate()
                json.dump(known, file)
                return answer
    return {}


def note(*words: str) -> None:
    with open(os.path.join(os.environ["FAKES"], "calls.jsonl"), "a") as file:
        file.write(json.dumps([os.getpid(), *words]) + "\n")


main()
