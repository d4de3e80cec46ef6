"""The oracle: tokens as a pure function of prompt and sampling."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from services.requests import Sampling
from services.worker.engines.protocol import Finish
from services.worker.engines.simulated.oracle import (
    EOS_TOKEN,
    TokenModel,
    expected_answer,
    expected_embedding,
    expected_tokens,
)

GREEDY = Sampling(max_new_tokens=24, temperature=0.0)
PROMPT = [5, 6, 7, 8]


def test_an_answer_goes_on_from_any_of_its_tokens() -> None:
    whole = expected_tokens(PROMPT, GREEDY)
    for done in range(1, 24):
        rest = replace(GREEDY, max_new_tokens=24 - done)
        assert expected_tokens(PROMPT + whole[:done], rest) == whole[done:]


def test_every_token_of_the_prompt_matters() -> None:
    answer = expected_tokens(PROMPT, GREEDY)
    for position in range(len(PROMPT)):
        other = PROMPT.copy()
        other[position] += 1
        assert expected_tokens(other, GREEDY)[0] != answer[0]


def test_greedy_ignores_what_only_sampling_uses() -> None:
    assert expected_tokens(PROMPT, replace(GREEDY, seed=3, top_p=0.5)) == expected_tokens(PROMPT, GREEDY)
    assert expected_tokens(PROMPT, replace(GREEDY, temperature=1.0, top_k=1)) == expected_tokens(PROMPT, GREEDY)


@pytest.mark.parametrize("change", [{"seed": 2}, {"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_sampling_changes_tokens_and_repeats(change: dict[str, float]) -> None:
    sampled = Sampling(max_new_tokens=8, seed=1)
    other = replace(sampled, **change)  # type: ignore[arg-type]
    assert expected_tokens(PROMPT, other) != expected_tokens(PROMPT, sampled)
    assert expected_tokens(PROMPT, other) == expected_tokens(PROMPT, other)


def test_penalties_forget_a_replayed_prefix_as_sglangs_do() -> None:
    punished = replace(GREEDY, frequency_penalty=0.5)
    whole = expected_tokens(PROMPT, punished)
    assert expected_tokens(PROMPT + whole[:4], punished)[0] != whole[4]


def test_ends_of_sequence() -> None:
    model = TokenModel(eos_rate=0.2)
    long = replace(GREEDY, max_new_tokens=400)
    answer = expected_answer(PROMPT, long, model)
    assert answer.finish is Finish.STOP
    assert answer.token_ids[-1] == EOS_TOKEN
    assert EOS_TOKEN not in answer.token_ids[:-1]
    ignoring = expected_answer(PROMPT, replace(long, ignore_eos=True), model)
    assert ignoring.finish is Finish.LENGTH
    assert len(ignoring.token_ids) == 400
    patient = expected_answer(PROMPT, replace(long, min_new_tokens=100), model)
    assert EOS_TOKEN not in patient.token_ids[:100]


def test_a_stop_token_beats_the_length() -> None:
    third = expected_tokens(PROMPT, GREEDY)[2]
    stopped = expected_answer(PROMPT, replace(GREEDY, max_new_tokens=3, stop_token_ids=(third,)))
    assert stopped.finish is Finish.STOP
    assert len(stopped.token_ids) == 3


def test_the_vocabulary_bounds_tokens() -> None:
    model = TokenModel(vocab_size=16)
    tokens = expected_tokens(PROMPT, replace(GREEDY, max_new_tokens=500), model)
    assert set(tokens) == set(range(3, 16))


def test_a_script_is_played_and_ends(tmp_path: Path) -> None:
    file = tmp_path / "script.json"
    file.write_text(json.dumps([{"prompt": PROMPT, "tokens": [100, 101, 102]}]))
    model = TokenModel()
    model.load_script(file)
    answer = expected_answer(PROMPT, GREEDY, model)
    assert answer.token_ids == [100, 101, 102, EOS_TOKEN]
    assert answer.finish is Finish.STOP
    assert expected_answer([*PROMPT, 100], GREEDY, model).token_ids == [101, 102, EOS_TOKEN]
    assert expected_tokens([1, 2, 3], GREEDY, model) == expected_tokens([1, 2, 3], GREEDY)


@pytest.mark.parametrize("content", ["{", '[{"prompt": [1]}]', '[{"prompt": [1], "tokens": [99999]}]', "[3]"])
def test_a_bad_script_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "script.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"--sim: script=.*script\.json"):
        TokenModel().load_script(file)


def test_a_vector_has_length_one_and_its_beginning_is_a_vector() -> None:
    whole = expected_embedding(PROMPT, 64)
    assert math.hypot(*whole) == pytest.approx(1.0)
    short = expected_embedding(PROMPT, 8)
    scale = math.hypot(*whole[:8])
    assert list(short) == pytest.approx([number / scale for number in whole[:8]])


def test_every_token_of_a_text_matters_to_its_vector() -> None:
    vector = expected_embedding(PROMPT, 8)
    for position in range(len(PROMPT)):
        other = PROMPT.copy()
        other[position] += 1
        assert expected_embedding(other, 8) != vector
