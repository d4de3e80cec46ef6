"""A prefill and a decode worker that play what a model would write, behind a frontend."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvbaton.client import Answer, SamplingParams, Tool
from services.frontend.text import ChatMessage, ChatTemplate, TextTokenizer
from services.requests import Role
from services.worker.engines.simulated import Addresses, SimulatedEngine, SimulatedOptions
from tests.support.cluster import FakeCluster
from tests.support.ports import free_port

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}\n"
    "{% endfor %}assistant:{% if enable_thinking %}<think>\n{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|python_tag|>"]
WEATHER = Tool(name="get_weather", description="Now.", parameters='{"type": "object"}')
HI = {"role": "user", "content": "hi"}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "days": [1, 2]}}\n</tool_call>'


def write_model(folder: Path) -> Path:
    """A token per byte; the simulated engine's end of sequence is a special token, as is Llama's marker."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


class Scripted:
    """A pair of workers; `plays` says what the model writes for a prompt."""

    def __init__(self, cluster: FakeCluster, folder: Path) -> None:
        self.cluster = cluster
        self._engines: list[SimulatedEngine] = []
        self._tokenizer = TextTokenizer(folder)
        self._template = ChatTemplate.from_folder(folder, {})

    async def start(self, **options: Any) -> None:
        """`options` of the simulated engines, parsers among them."""
        defaults: dict[str, Any] = {"vocab_size": 300, "decode_step": 0.0002}
        simulated = SimulatedOptions(**defaults | options)
        for role in (Role.PREFILL, Role.DECODE):
            port = free_port()
            engine = SimulatedEngine(role, simulated, Addresses(bootstrap_port=port))
            engine.start()
            self._engines.append(engine)
            await self.cluster.start_worker(
                role, engine=engine, bootstrap_answers=False, disaggregation_bootstrap_port=port
            )
        await self.cluster.routable(2)

    def plays(
        self, answer: str, *, tools: Sequence[Tool] = (), arguments: Mapping[str, Any] | None = None
    ) -> list[int]:
        """What `HI` is answered with; returns its tokens."""
        told = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": json.loads(tool.parameters),
                },
            }
            for tool in tools
        ]
        messages = [ChatMessage(HI["role"], HI["content"])]
        prompt = self._template.render(messages, tools=told or None, template_arguments=arguments)
        tokens = self._tokenizer._encode(answer, False)
        for engine in self._engines:
            engine.model.play(self._tokenizer._encode(prompt, False), tokens)
        return tokens

    async def ask(self, **request: Any) -> Answer:
        sampling = request.pop("sampling", SamplingParams(max_new_tokens=1000, temperature=0))
        return await self.cluster.client.generate(chat=[HI], sampling=sampling, **request)
