"""Reasoning and tool calls in the text of an answer, while it is generated. No SGLang.

- `protocol`: what every parser takes and gives
- `reasoning`: `<think>` to `</think>`
- `tool_calls`: calls as JSON objects, marked or in an array; `call_object`, `json_value`: one of them, read in pieces
- `catalog`: which parsers there are, by SGLang's names
- `grammars`: grammars that hold a model to its tools
"""
