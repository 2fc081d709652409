"""The three formats of prompts and answers: `TEMPLATES[name]` renders a prompt, renders a gold
answer, parses a generation.

No jax in here, not even indirectly: data workers and reward hosts import it.
"""

import dataclasses
from collections.abc import Callable

from rest_jax.templates import hermes, llama3, toolrl
from rest_jax.tool_calls import Answer, Target


@dataclasses.dataclass(frozen=True)
class Template:
    """One template. `parse` is total: any bytes give an `Answer`."""

    name: str
    # (tools, history, brief=False): tools and dialogue so far to chat messages ({"role", "content"})
    render_prompt: Callable[..., list[dict[str, str]]]
    render_answer: Callable[[Target], str]
    parse: Callable[[bytes], Answer]
    # words by which a model's own chat template asks for calls in this form: it then lists the tools itself
    request: str | None = None


TEMPLATES: dict[str, Template] = {
    "toolrl": Template("toolrl", toolrl.render_prompt, toolrl.render_answer, toolrl.parse),
    "hermes": Template(
        "hermes", hermes.render_prompt, hermes.render_answer, hermes.parse, hermes.REQUEST
    ),
    "llama3": Template(
        "llama3", llama3.render_prompt, llama3.render_answer, llama3.parse, llama3.REQUEST
    ),
}
