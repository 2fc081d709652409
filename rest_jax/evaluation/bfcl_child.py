"""The process of a BFCL evaluation: it has the package bfcl_eval and knows nothing of rest_jax, whose `bfcl.py` starts it.

Lines of JSON. Out: {"package": its release, "missing": modules that it needs}. In: {"root", "categories", "limit", "functions",
"at_once", "seconds"}. Out: {"entries", "sha256", "answered", "network"}; queries {"key", "messages", "tools"}, without tools
where they are those of the query before. In: for each {"key", "message", "calls", "text", "tokens", "prompt_tokens", "truncated"}
or {"key", "error"}. Out: {"answered"} for each entry that is done; at last {"scores", "leaderboard", "items"}.

Entries are asked by the package's `inference()`, those whose calls it executes in processes of their own, forked from this one;
what was answered is kept in root/answers.jsonl and not asked again. The package's `eval_runner.main()` is the only judge. What a
model writes reaches its `eval()` as calls alone: names are identifiers, values the repr() of JSON values, and nothing is in sight
but the tools.
"""

import contextlib
import csv
import ctypes
import gc
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import keyword
import os
import pathlib
import resource
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any

MODEL = "rest-jax"  # the package takes an underscore in a model's name for a slash
# what is imported on the way that is taken through the package
NEEDED = (
    *("dotenv", "filelock", "mpmath", "numpy", "overrides", "pandas", "tenacity", "tqdm"),
    *("tree_sitter", "tree_sitter_java", "tree_sitter_javascript"),
)
UNKNOWN = "no_such_tool()"  # what is evaluated for a call that is none
PROCESSES = 128  # of dialogues at once
MEMORY = 4 << 30  # bytes of addresses of a process
LARGEST_FILE = 16 << 30  # bytes; an entry's process may write none
_NEW_USER, _NEW_NETWORK, _PARENT_DEATH = 0x10000000, 0x40000000, 1  # of Linux


def main() -> None:
    """Answers and judges the entries of one job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end of the input is what ends it
    up = Lines(0, os.dup(1))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the package prints
    up.send(
        package=importlib.metadata.version("bfcl-eval"),
        missing=[name for name in NEEDED if importlib.util.find_spec(name) is None],
    )
    job = up.receive()
    if job is None:
        return
    root = pathlib.Path(job["root"]).absolute()
    root.mkdir(parents=True, exist_ok=True)
    network = leave_network()
    limit_resources(job)
    with tempfile.TemporaryDirectory(dir=root) as empty:
        os.chdir(empty)
        os.environ["BFCL_PROJECT_ROOT"] = str(root)
        os.environ.pop("WANDB_BFCL_PROJECT", None)
        os.environ["OPENBLAS_NUM_THREADS"] = (
            "1"  # the stacks of many threads would be over the limit
        )
        package = Package(job["functions"])
        found = (package.entries(name)[: job["limit"]] for name in job["categories"])
        entries = by_key([entry for category in found for entry in category])
        journal = Journal(root / "answers.jsonl", entries)
        up.send(
            entries=len(entries),
            sha256=hashlib.sha256(json.dumps(list(entries.values())).encode()).hexdigest(),
            answered=len(journal.answers),
            network=network,
        )
        if ask_all(package, entries, journal, up, job):
            up.send(**judge(package, entries, journal.answers, root))
        os.chdir(root)


def by_key(entries: list[dict]) -> dict[str, dict]:
    """The entries by their ids; of those that have one id (two of v3 do) the later ones are told apart by a number. There is one
    copy of each description of a function: a process is forked the faster, the less it has.
    """
    found: dict[str, dict] = {}
    kept: dict[str, dict] = {}
    for entry in entries:
        entry["function"] = [kept.setdefault(json.dumps(f), f) for f in entry["function"]]
        names = (f"{entry['id']}#{i}" for i in range(2, len(entries) + 2))
        key = entry["id"] if entry["id"] not in found else next(n for n in names if n not in found)
        found[key] = entry
    return found


def leave_network() -> str | None:
    """Moves this process into a network namespace without interfaces. What the system says when it refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare"):
        return f"{sys.platform} has no network namespaces"
    # root may do so at once, others as the root of a user namespace
    if not libc.unshare(_NEW_NETWORK) or not libc.unshare(_NEW_USER | _NEW_NETWORK):
        return None
    return os.strerror(ctypes.get_errno())


def limit_resources(job: dict) -> None:
    """Bounds what this process may use. Those of the entries are forked from it."""
    hours = 24 * 3600  # the judge takes each entry's seconds once more
    for kind, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, hours),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_NOFILE, job["at_once"] + 64),
        (resource.RLIMIT_CORE, 0),
    ):
        lower(kind, most)


def lower(kind: int, most: int) -> None:
    """Sets a limit of this process, unless the present one is lower."""
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


class Lines:
    """JSON objects, one a line, on two file descriptors."""

    def __init__(self, source: int, target: int):
        self.source, self.target = source, target
        self._rest = b""

    def receive(self) -> dict | None:
        """The next object, None at the end."""
        while b"\n" not in self._rest:
            if not self._read():
                return None
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def ready(self) -> list[dict | None]:
        """The objects that are there, once there is something to read; None at the end."""
        if not self._read():
            return [None]
        *lines, self._rest = self._rest.split(b"\n")
        return [json.loads(line) for line in lines]

    def send(self, **message: object) -> None:
        """Writes one object."""
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[os.write(self.target, data) :]

    def _read(self) -> bool:
        try:
            data = os.read(self.source, 1 << 16)
        except ConnectionResetError:
            data = b""
        self._rest += data
        return bool(data)


class Journal:
    """The answers of a job by key, kept in a file as they come. A line that was cut is as if it were not there, and so is one of
    an entry that was broken off: there may be more room now.
    """

    def __init__(self, path: pathlib.Path, entries: dict):
        self.path, self.answers = path, {}
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for line in lines[:-1]:
            with contextlib.suppress(ValueError):
                answer = json.loads(line)
                if answer["key"] in entries and answer["error"] is None:
                    self.answers[answer["key"]] = answer
        if lines and lines[-1]:  # the line of an answer that was being written
            with path.open("ab") as file:
                file.write(b"\n")

    def write(self, answer: dict) -> None:
        """Keeps an answer."""
        self.answers[answer["key"]] = answer
        with self.path.open("a") as file:
            file.write(json.dumps(answer) + "\n")


# --- the package ------------------------------------------------------------------------------------------------------


class Package:
    """What is used of bfcl_eval, the same for its versions.

    `functions`: the model gets function tools as those of vendors do, with underscores for dots. Else the descriptions are as
    they are in the data, and functions that come later are told in the user's words.
    """

    def __init__(self, functions: bool):
        # The package's own module of this name imports every vendor's SDK.
        config = types.ModuleType("bfcl_eval.constants.model_config")
        sys.modules[config.__name__] = config
        config.MODEL_CONFIG_MAPPING = {}  # type: ignore[attr-defined]
        self.functions = functions
        self.config = module("constants.eval_config")
        self.runner = module("eval_checker.eval_runner")
        self.utils = module("model_handler.utils")
        self.handler_class = handler_of(self)
        config.MODEL_CONFIG_MAPPING[MODEL] = types.SimpleNamespace(  # type: ignore[attr-defined]
            model_name=MODEL,
            display_name=MODEL,
            url="",
            org="",
            license="",
            model_handler=self.handler_class,
            input_price=None,
            output_price=None,
            is_fc_model=functions,
            underscore_to_dot=functions,
        )
        self.handler = self.runner.get_handler(MODEL)
        hide_from_eval(module("eval_checker.multi_turn_eval.multi_turn_utils"))

    def entries(self, category: str) -> list[dict]:
        """The entries of a category, with the descriptions of their functions."""
        utils = module("utils")
        if hasattr(utils, "load_dataset_entry"):  # 2026
            return utils.load_dataset_entry(category)
        entries = utils.load_file(self._data(category))
        for entry in module("_llm_response_generation").process_multi_turn_test_case(entries):
            self.utils.func_doc_language_specific_pre_processing(entry["function"], category)
        return entries

    def tools(self, functions: list[dict]) -> list[dict]:
        """The tools of descriptions, as the model gets them."""
        if not self.functions:
            about = ({key: f[key] for key in ("name", "description")} for f in functions)
            given = (f["parameters"].get("properties", {}) for f in functions)
            return [tool | {"parameters": p} for tool, p in zip(about, given, strict=True)]
        styles = self.utils.ModelStyle
        style = getattr(styles, "OPENAI_COMPLETIONS", None) or styles.OpenAI
        return self.utils.convert_to_tool(functions, self.utils.GORILLA_TO_OPENAPI, style)

    def judge(self, categories: list[str], ids: set) -> None:
        """Runs the judge on the answers that are in the result folder, those to `ids`."""
        if hasattr(self.runner, "_subset_entries_by_model_ids"):  # 2026
            self.runner.main([MODEL], categories, None, None, partial_eval=True)
            return
        # This version compares with all entries that the folders of the data have.
        with tempfile.TemporaryDirectory() as folder:
            for name in ("PROMPT_PATH", "POSSIBLE_ANSWER_PATH"):
                part = pathlib.Path(folder) / name
                part.mkdir()
                for category in categories:
                    file = getattr(self.config, name) / self._data(category).name
                    if file.exists():
                        lines = file.read_text().strip("\n").split("\n")
                        kept = [line for line in lines if json.loads(line)["id"] in ids]
                        (part / file.name).write_text("".join(f"{line}\n" for line in kept))
                setattr(self.runner, name, part)
            self.runner.main([MODEL], categories, None, None)

    def _data(self, category: str) -> pathlib.Path:
        files = module("constants.category_mapping").TEST_FILE_MAPPING
        return self.config.PROMPT_PATH / files[category]


def module(name: str) -> Any:
    """A module of the package."""
    return importlib.import_module(f"bfcl_eval.{name}")


def hide_from_eval(utils: types.ModuleType) -> None:
    """Leaves the module's `eval()` no name that does something but those of tools: no builtin, not the function that calls it."""
    names = vars(utils)
    names["__builtins__"] = {}
    # who needs it has imported it by now
    del names["execute_multi_turn_func_call"]


def handler_of(package: Package) -> type:
    """The class of the model: what it is asked goes to `ask`, and what it has answered is already read."""

    class Handler(module("model_handler.base_handler").BaseHandler):
        ask: Callable[[list, list], dict]  # messages, tools -> the reply

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.is_fc_model = package.functions

        def decode_ast(self, result, *_, **__):
            return result if isinstance(result, list) else []

        def decode_execute(self, result, *_, **__):
            return [expression(call) for call in result] if isinstance(result, list) else []

        def _pre_query_processing_FC(self, inference_data, test_entry):
            return {"messages": [], "tools": []}

        def _compile_tools(self, inference_data, test_entry):
            tools = package.tools(test_entry["function"])
            return inference_data | {"tools": tools}

        def _query_FC(self, inference_data):
            return self.ask(inference_data["messages"], inference_data["tools"]), 0

        def _parse_query_response_FC(self, api_response):
            return {
                "model_responses": api_response["calls"] or api_response["text"],
                "message": api_response["message"],
                "input_token": api_response["prompt_tokens"],
                "output_token": api_response["tokens"],
            }

        def add_first_turn_message_FC(self, inference_data, first_turn_message):
            inference_data["messages"] += first_turn_message
            return inference_data

        _add_next_turn_user_message_FC = add_first_turn_message_FC

        def _add_assistant_message_FC(self, inference_data, model_response_data):
            inference_data["messages"].append(model_response_data["message"])
            return inference_data

        def _add_execution_results_FC(self, inference_data, execution_results, model_response_data):
            calls = model_response_data["message"]["tool_calls"]
            made = self.decode_execute(model_response_data["model_responses"])
            for call, name, result in zip(calls, made, execution_results, strict=True):
                if not package.functions:  # the words of ToolRL's handler
                    result = f"You have made the tool call {name}. Execution returns: {result}"
                about = {"role": "tool", "tool_call_id": call["id"]}
                inference_data["messages"].append(about | {"content": result})
            return inference_data

        def _pre_query_processing_prompting(self, test_entry):
            return self._compile_tools({"messages": []}, test_entry)

        _query_prompting = _query_FC
        _parse_query_response_prompting = _parse_query_response_FC
        add_first_turn_message_prompting = add_first_turn_message_FC
        _add_next_turn_user_message_prompting = add_first_turn_message_FC
        _add_assistant_message_prompting = _add_assistant_message_FC
        _add_execution_results_prompting = _add_execution_results_FC

    return Handler


def expression(call: dict) -> str:
    """A call as the package evaluates it. One that is not made of identifiers and values becomes that of an unknown tool."""
    ((name, arguments),) = call.items()
    if not all(word.isidentifier() and not keyword.iskeyword(word) for word in (name, *arguments)):
        return UNKNOWN
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


# --- entries ----------------------------------------------------------------------------------------------------------


def ask_all(package: Package, entries: dict, journal: Journal, up: Lines, job: dict) -> bool:
    """Answers the entries that were not answered, dialogues of many turns first. False when the input has ended."""
    waiting = [key for key in reversed(entries) if key not in journal.answers]
    turns = [key for key in waiting if has_turns(entries[key])]
    single = [key for key in waiting if not has_turns(entries[key])]
    asked: set[str] = set()  # that wait for a reply
    dialogues: dict[str, Lines] = {}  # of those that have a process

    def done(name: str, found: dict) -> None:
        asked.remove(name)
        journal.write({"key": name, "id": entries[name]["id"], **found})
        up.send(answered=1)

    gc.freeze()  # a collection in a forked process would copy all memory
    with selectors.DefaultSelector() as selector:
        selector.register(up.source, selectors.EVENT_READ)
        while turns or single or asked:
            while len(asked) < job["at_once"]:
                queue = turns if turns and len(dialogues) < PROCESSES else single
                if not queue:
                    break
                name = queue.pop()
                entry = entries[name]
                asked.add(name)
                if has_turns(entry):
                    lines = dialogues[name] = start(package.handler, entry, job["seconds"])
                    selector.register(lines.source, selectors.EVENT_READ, name)
                else:
                    up.send(key=name, **only_query(package.handler, entry))
            for key, _ in selector.select():
                if key.data is None:
                    for reply in up.ready():
                        if reply is None:
                            return False
                        name = reply["key"]
                        if name in dialogues:
                            dialogues[name].send(**reply)
                        else:
                            # nothing is executed of a single turn
                            done(
                                name, answer(package.handler, entries[name], lambda *_, r=reply: r)
                            )
                    continue
                name, lines = key.data, dialogues[key.data]
                message = lines.receive()
                if message is not None and "query" in message:
                    up.send(key=name, **message["query"])
                    continue
                selector.unregister(lines.source)
                os.close(lines.source)
                del dialogues[name]
                os.wait()
                over = f"its calls took more than {job['seconds']} s of processor time, or too much memory"
                done(name, message or failed(over, []))
    return True


def has_turns(entry: dict) -> bool:
    """Whether it is a dialogue of many turns, whose calls are executed."""
    return "multi_turn" in entry["id"]


def only_query(handler: Any, entry: dict) -> dict:
    """The query of an entry of one turn."""
    found: dict = {}

    def ask(messages: list[dict], tools: list[dict]) -> dict:
        found.update(messages=messages, tools=tools)
        raise InterruptedError

    handler.ask = ask
    with contextlib.suppress(InterruptedError):
        handler.inference(entry, False, True)
    return found


def start(handler: Any, entry: dict, seconds: int) -> Lines:
    """Begins a dialogue in a process of its own, which may take so many seconds of processor time. Its lines: queries, then the
    answer.
    """
    ours, theirs = socket.socketpair()
    if os.fork():
        theirs.close()
        descriptor = ours.detach()
        return Lines(descriptor, descriptor)
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
        gc.disable()
        lower(resource.RLIMIT_FSIZE, 0)
        lower(resource.RLIMIT_NPROC, 0)
        lower(resource.RLIMIT_CPU, seconds)
        lines = Lines(theirs.fileno(), theirs.fileno())
        told: list[list] = []

        def ask(messages: list[dict], tools: list[dict]) -> dict:
            new = {"tools": tools} if told != [tools] else {}  # most of the text of a dialogue
            told[:] = [tools]
            lines.send(query={"messages": messages} | new)
            return lines.receive() or os._exit(0)

        lines.send(**answer(handler, entry, ask))
    finally:
        os._exit(0)


def answer(handler: Any, entry: dict, ask: Callable[[list, list], dict]) -> dict:
    """The package's result of an entry, and under "replies" what else is known of the model's."""
    replies: list[dict] = []

    def asked(messages: list[dict], tools: list[dict]) -> dict:
        reply = ask(messages, tools)
        if "error" in reply:
            raise ValueError(reply["error"])
        replies.append({name: reply[name] for name in ("text", "tokens", "truncated")})
        return reply

    handler.ask = asked
    try:
        result, about = handler.inference(entry, False, True)
    except Exception as error:
        return failed(str(error), replies)
    return {"result": result, **about, "replies": replies, "error": None}


def failed(reason: str, replies: list[dict]) -> dict:
    """The answer of an entry that was broken off, with the result that the package then writes."""
    return {"result": f"Error during inference: {reason}", "replies": replies, "error": reason}


# --- the judge --------------------------------------------------------------------------------------------------------


def judge(package: Package, entries: dict, answers: dict, root: pathlib.Path) -> dict:
    """The scores of the categories, the package's own table, and the items one by one."""
    for folder in (package.config.RESULT_PATH, package.config.SCORE_PATH):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    ours = ("key", "replies", "error")
    results = [{k: v for k, v in answers[key].items() if k not in ours} for key in entries]
    package.handler.write(results, package.config.RESULT_PATH)
    categories = list(dict.fromkeys(map(category_of, entries)))
    package.judge(categories, {entry["id"] for entry in entries.values()})
    scores, wrong = {}, set()
    for category in categories:
        (file,) = package.config.SCORE_PATH.rglob(f"*_v?_{category}_score.json")
        scores[category], *others = map(json.loads, file.read_text().strip("\n").split("\n"))
        wrong |= {told_apart(item["id"], item["prompt"]) for item in others}
    with (package.config.SCORE_PATH / "data_overall.csv").open() as file:
        (leaderboard,) = csv.DictReader(file)
    items = [
        {"id": key, "group": category_of(key)}
        | {"correct": told_apart(entry["id"], entry) not in wrong}
        | {name: answers[key][name] for name in ("replies", "error")}
        for key, entry in entries.items()
    ]
    return {"scores": scores, "leaderboard": leaderboard, "items": items}


def told_apart(name: str, entry: dict) -> tuple[str, str]:
    """What tells an entry from all others: two have one id."""
    return name, json.dumps(entry["question"])


def category_of(key: str) -> str:
    """The category of an entry."""
    return key.rsplit("_", 1)[0]


if __name__ == "__main__":
    main()
