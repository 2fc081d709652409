"""The three formats of prompts and answers: `TEMPLATES[name]` renders a prompt, renders a gold
answer, parses a generation. `TEMPLATES[name].behind(True)` does so for models whose chat template
ends a prompt in an opened thought (Qwen3-Thinking-2507, R1 distillates).

No jax in here, not even indirectly: data workers and reward hosts import it.
"""

import dataclasses
from collections.abc import Callable

from rest_jax.templates import hermes, llama3, toolrl
from rest_jax.tool_calls import Answer, Call, Target

# What the templates write and tokenizers may have as one token. In text that is already rendered these are no quotations.
TAGS = frozenset(
    f"<{slash}{name}>"
    for name in ("think", "tool_call", "response", "tools", "tool_response", "user", "obs")
    for slash in ("", "/")
) | {"<|python_tag|>"}


@dataclasses.dataclass(frozen=True)
class Template:
    """One template. `parse` is total: any bytes give an `Answer`."""

    name: str
    # (tools, history, brief=False): tools and dialogue so far to chat messages ({"role", "content"})
    render_prompt: Callable[..., list[dict[str, str]]]
    _render_answer: Callable[[Target], str]
    _parse: Callable[[bytes, bool], Answer]
    # words by which a model's own chat template asks for calls in this form: it then lists the tools itself
    request: str | None = None
    bare: bool = False  # calls stand in the text, without tags
    thought_open: bool = False  # prompts end in an opened thought: completions continue it

    def behind(self, thought_open: bool) -> "Template":
        """The template for prompts that end in an opened thought, or that do not."""
        return dataclasses.replace(self, thought_open=thought_open)

    def render_answer(self, target: Target) -> str:
        """The gold answer, from where the prompt ends."""
        text = self._render_answer(target)
        if not self.thought_open:
            return text
        if not text.startswith("<think>"):  # the thought is to be closed all the same
            think = target.think or ""
            text = self._render_answer(dataclasses.replace(target, think=think, text=None))
        text = text.removeprefix("<think>")
        return text[1:] if text[:1].isspace() else text  # the prompt has a line end there, or words

    def call_opening(self, name: str | None = None) -> str:
        """How an answer begins that calls this tool, or any: up to what is to be chosen, its arguments or its name."""
        text = self.render_answer(Target(calls=(Call(name or "", {}),)))
        return text[: text.rindex('""' if name is None else "{}")].rstrip()

    def parse(self, data: bytes) -> Answer:
        """Parses one generation (see `parser`)."""
        return self._parse(data, self.thought_open)


TEMPLATES: dict[str, Template] = {
    "toolrl": Template("toolrl", toolrl.render_prompt, toolrl.render_answer, toolrl.parse),
    "hermes": Template(
        "hermes", hermes.render_prompt, hermes.render_answer, hermes.parse, hermes.REQUEST
    ),
    "llama3": Template(
        "llama3",
        llama3.render_prompt,
        llama3.render_answer,
        llama3.parse,
        llama3.REQUEST,
        bare=True,
    ),
}
