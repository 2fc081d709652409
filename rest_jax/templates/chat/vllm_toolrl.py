"""Tool calls of the toolrl format for vLLM: `--tool-parser-plugin THIS_FILE --tool-call-parser toolrl`.

A completion is `<think> .. </think>`, `<tool_call>` with one call a line, `{"name": .., "parameters": {..}}`, `</tool_call>`,
`<response> .. </response>`. The text of the response, and what is outside of all blocks, is the content; thoughts are left to
`--reasoning-parser`, and without one they are left out. A line that is no call is none.

A thought that the prompt has opened looks like content until it is closed. Behind a reasoning parser no thought comes here;
without one THOUGHT_OPENED is to be True, so that a stream keeps back what may be a thought.
"""

import json
import re
import uuid

try:
    from vllm.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager
except ImportError:  # before vLLM 0.12
    from vllm.entrypoints.openai.tool_parsers.abstract_tool_parser import (
        ToolParser,
        ToolParserManager,
    )
try:
    from vllm.entrypoints.openai.engine.protocol import (
        DeltaFunctionCall,
        DeltaMessage,
        DeltaToolCall,
        ExtractedToolCallInformation,
        FunctionCall,
        ToolCall,
    )
except ImportError:  # before vLLM 0.14
    from vllm.entrypoints.openai.protocol import (
        DeltaFunctionCall,
        DeltaMessage,
        DeltaToolCall,
        ExtractedToolCallInformation,
        FunctionCall,
        ToolCall,
    )

# Whether prompts end in an opened thought that no reasoning parser takes. An export sets it where the tags are no tokens, so that
# none can.
THOUGHT_OPENED = False

_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>")
_TAG = re.compile("|".join(map(re.escape, _TAGS)))
_BLOCK = re.compile("<tool_call>|<response>")
_BLOCK_END = re.compile("</tool_call>|</response>")


def read(text: str, ended: bool) -> tuple[str, list[tuple[str, str]]]:
    """(content, calls as names and JSON of arguments) of a completion. Not `ended`: what more text could still change is left
    out.
    """
    block, content, calls, at = "", [], "", _begin(text, ended)
    for tag in [*_TAG.finditer(text, at), None]:
        part = text[at : tag.start()] if tag else text[at:]
        if tag is None and not ended:
            part = _certain(part)
        if block == "<tool_call>":
            complete = ended or tag is not None
            calls += part if complete else part[: part.rfind("\n") + 1]
        elif block != "<think>":
            content.append(part)
        if tag is None:
            break
        inside = block and tag.group() != block.replace("<", "</")
        if block == "<tool_call>":
            inside = inside or _in_quotes(calls.rpartition("\n")[2])
        if inside:  # another block's tag, or one in a string, is text of this block
            if block == "<tool_call>":
                calls += tag.group()
            elif block == "<response>":
                content.append(tag.group())
        else:
            block = "" if block or tag.group().startswith("</") else tag.group()
            calls += "\n"
        at = tag.end()
    return "".join(content).strip(), list(_calls(calls))


def _begin(text: str, ended: bool) -> int:
    """Where the answer begins behind a thought that the prompt has opened. One that is never closed lasts until a block."""
    close = text.find("</think>")
    if close >= 0 and (THOUGHT_OPENED or "<think>" not in text[:close]):
        return close + len("</think>")
    if not THOUGHT_OPENED:
        return 0
    block = _BLOCK.search(text)
    if block is None or not (ended or _BLOCK_END.search(text, block.end())):
        return len(text)
    return block.start()


def _certain(text: str) -> str:
    """Without an end that may become a tag."""
    start = text.rfind("<")
    if start >= 0 and any(tag.startswith(text[start:]) for tag in _TAGS):
        text = text[:start]
    return text


def _in_quotes(line: str) -> bool:
    """Whether a string of JSON is open at the end."""
    return line.replace("\\\\", "").replace('\\"', "").count('"') % 2 == 1


def _calls(lines: str):
    for line in lines.split("\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        named = isinstance(value, dict) and isinstance(value.get("name"), str)
        if named and isinstance(value.get("parameters"), dict):
            yield value["name"], json.dumps(value["parameters"], ensure_ascii=False)


@ToolParserManager.register_module(["toolrl"])
class ToolRLToolParser(ToolParser):
    """Reads what has come of a completion again with every delta: completions are short."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._sent = ""

    def adjust_request(self, request):
        """The tags may be special tokens."""
        request = super().adjust_request(request)
        if request.tools and request.tool_choice != "none":
            request.skip_special_tokens = False
        return request

    def extract_tool_calls(self, model_output, request):
        """All of a completion."""
        content, calls = read(model_output, ended=True)
        made = [
            ToolCall(type="function", function=FunctionCall(name=name, arguments=arguments))
            for name, arguments in calls
        ]
        return ExtractedToolCallInformation(
            tools_called=bool(made), tool_calls=made, content=content or None
        )

    def extract_tool_calls_streaming(
        self,
        previous_text,
        current_text,
        delta_text,
        previous_token_ids,
        current_token_ids,
        delta_token_ids,
        request,
    ):
        """What is new: content as it is certain, a call when its line is complete."""
        content, calls = read(current_text, ended=False)
        new, self._sent = content[len(self._sent) :], content
        deltas = []
        for index in range(len(self.prev_tool_call_arr), len(calls)):
            name, arguments = calls[index]
            # by these vLLM knows at the end what has been sent
            self.prev_tool_call_arr.append({"name": name, "arguments": json.loads(arguments)})
            self.streamed_args_for_tool.append(arguments)
            self.current_tool_id = index
            deltas.append(
                DeltaToolCall(
                    index=index,
                    type="function",
                    id=f"chatcmpl-tool-{uuid.uuid4().hex}",
                    function=DeltaFunctionCall(name=name, arguments=arguments),
                )
            )
        if not new and not deltas:
            return None
        return DeltaMessage(content=new or None, tool_calls=deltas)
