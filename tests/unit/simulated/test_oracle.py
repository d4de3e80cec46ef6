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
    expected_logprobs,
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


def test_one_answer_for_every_prompt_that_has_none_of_its_own() -> None:
    model = TokenModel()
    model.play(PROMPT, [100])
    model.play(None, [7, 8])
    assert expected_tokens(PROMPT, GREEDY, model) == [100, EOS_TOKEN]
    assert expected_tokens([1, 2, 3], GREEDY, model) == [7, 8, EOS_TOKEN]


def test_a_bias_of_100_decides_by_itself() -> None:
    plain = expected_tokens(PROMPT, GREEDY)
    assert expected_tokens(PROMPT, replace(GREEDY, logit_bias=((9, 100.0),))) == [9] * 24
    banned = expected_tokens(PROMPT, replace(GREEDY, logit_bias=((plain[0], -100.0),)))
    assert plain[0] not in banned
    assert len(banned) == 24
    assert expected_tokens(PROMPT, replace(GREEDY, logit_bias=((9, 1.0),))) != plain


def test_where_all_tokens_are_banned_there_is_an_end() -> None:
    model = TokenModel(vocab_size=16)
    banned = tuple((token, -100.0) for token in range(3, 15))
    assert expected_tokens(PROMPT, replace(GREEDY, logit_bias=banned), model) == [15] * 24
    assert expected_tokens(PROMPT, replace(GREEDY, logit_bias=(*banned, (15, -100.0))), model) == [EOS_TOKEN]


@pytest.mark.parametrize("top", [0, 1, 5, 20])
def test_log_probabilities_are_of_the_tokens_and_add_up_to_less_than_one(top: int) -> None:
    logprobs = expected_logprobs(PROMPT, GREEDY, top)
    assert [each.token_id for each in logprobs] == expected_tokens(PROMPT, GREEDY)
    for each in logprobs:
        assert len({other.token_id for other in each.top}) == top
        assert [other.logprob for other in each.top] == sorted((other.logprob for other in each.top), reverse=True)
        assert sum(math.exp(other.logprob) for other in each.top) < 1
        assert not each.top or (each.top[0].token_id, each.top[0].logprob) == (each.token_id, each.logprob)
    assert len({each.logprob for each in logprobs}) > 1


@pytest.mark.parametrize(
    "content",
    ["{", '[{"prompt": [1]}]', '[{"prompt": [1], "tokens": [99999]}]', "[3]", '[{"prompt": 5, "tokens": []}]'],
)
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
