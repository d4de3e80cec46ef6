"""What transformers answers on the same weights, and how sure it was of each token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT_LENGTHS = (1, 15, 16, 17, 31, 32, 33, 200, 900)
NEW_TOKENS = 32
# Two implementations of float32 arithmetic may order two logits differently when they are closer than this.
NEAR_TIE = 1e-3

_TEXT = (
    "The river had been rising since noon, and by the time the lamps were lit along the quay the lower steps had gone. "
    "Nobody in the town could remember water like it. Numbers help: 1 + 1 = 2, 17 * 3 = 51, and 2 ** 10 = 1024. "
    "def area(width: float, height: float) -> float:\n    return width * height\n\n"
    "Die Brücke über den Fluss war gesperrt; 橋は閉鎖された。 Still, the ferry ran, and people took it, one by one. "
)


def make_prompts(model_path: Path) -> dict[int, list[int]]:
    """Prompts of exactly the wanted lengths: around page boundaries, and over several chunks."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    tokens: list[int] = tokenizer.encode(_TEXT * 12, add_special_tokens=False).ids
    # Each starts somewhere else, so that no prompt is another's prefix and nothing comes from a prefix cache.
    return {length: tokens[index : index + length] for index, length in enumerate(PROMPT_LENGTHS)}


def pooled_states(model_path: Path, prompts: dict[int, list[int]]) -> dict[int, list[float]]:
    """The last token's state behind the last norm, which SGLang pools of a Llama; by transformers in float32."""
    import torch
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(model_path, dtype=torch.float32).eval()
    with torch.no_grad():
        return {
            length: model(torch.tensor([prompt])).last_hidden_state[0, -1].tolist()
            for length, prompt in prompts.items()
        }


def log_probabilities(model_path: Path, prompt: list[int], tokens: list[int]) -> list[list[float]]:
    """Of the whole vocabulary ahead of each of `tokens`; by transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: Any = model(torch.tensor([prompt + tokens])).logits[0]
    rows: Any = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return rows.tolist()


@dataclass(frozen=True)
class Reference:
    """Greedy tokens by prompt length, and the gap between the best two logits at each step."""

    tokens: dict[int, list[int]]
    gaps: dict[int, list[float]]

    @classmethod
    def compute(cls, model_path: Path, prompts: dict[int, list[int]]) -> Reference:
        """Runs transformers in float32."""
        import torch
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        tokens: dict[int, list[int]] = {}
        gaps: dict[int, list[float]] = {}
        for length, prompt in prompts.items():
            output: Any = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones((1, length), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
            tokens[length] = output.sequences[0, length:].tolist()
            best = [logits[0].topk(2).values for logits in output.logits]
            gaps[length] = [float(values[0] - values[1]) for values in best]
        return cls(tokens, gaps)

    def differences(self, answers: dict[int, list[int]]) -> list[str]:
        """Every answer that leaves the reference, in words. Raises AssertionError where no near tie explains it.

        After a near tie that was decided the other way the two texts are different texts: the rest is not compared.
        """
        return self.differences_between(answers, self.tokens)

    def differences_between(self, answers: dict[int, list[int]], others: dict[int, list[int]]) -> list[str]:
        """The same for two sets of answers, whose first different token must be a near tie of the reference.

        Where both have left the reference together before, the gaps are those of another text: it counts as different.
        """
        found: list[str] = []
        for length, answer in answers.items():
            other = others[length]
            position = _first_difference(answer, other)
            if position is None:
                continue
            where = f"prompt of {length} tokens, token {position}"
            left = _first_difference(answer, self.tokens[length])
            if left is not None and left < position:
                found.append(f"{where}: both left the reference at token {left}")
                continue
            gap = self.gaps[length][position]
            assert gap < NEAR_TIE, (
                f"{where}: {answer[position]} instead of {other[position]},"
                f" although the best two logits are {gap:.4f} apart"
            )
            found.append(f"{where}: near tie of {gap:.2e}")
        return found


def _first_difference(one: list[int], other: list[int]) -> int | None:
    assert len(one) == len(other), f"{len(one)} tokens came back instead of {len(other)}"
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
