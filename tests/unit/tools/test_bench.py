"""`kvbaton bench`: what its words mean, what its seed fixes, what its flags refuse, what its report contains."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import statistics
from array import array
from collections import Counter
from datetime import UTC, datetime
from itertools import islice, pairwise
from pathlib import Path

import pytest

from kvbaton.v1 import model_pb2, worker_pb2
from services.config.flags import ConfigError, build
from services.tools.bench import command
from services.tools.bench.monitor import Monitor
from services.tools.bench.options import BenchFlags
from services.tools.bench.report import Report
from services.tools.bench.results import Results
from services.tools.bench.samples import Gaps, Kind, Outcome, Sample, gaps_between
from services.tools.bench.sender import CancelTimes
from services.tools.bench.statistics import Distribution, Histogram, percentile, weighted_percentile
from services.tools.bench.workload import Workload, poisson

FINISHED = Outcome(Kind.FINISHED, reason="length")
NO_WORKER = Outcome(Kind.ERROR, "UNAVAILABLE", "NO_WORKER")


def flags(*arguments: str) -> BenchFlags:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser.add_subparsers())
    return build(BenchFlags, parser.parse_args(["bench", *arguments]), {})


def sample(
    index: int = 0,
    times: tuple[float, ...] = (1.0, 2.0),
    tokens: tuple[int, ...] = (1, 1),
    outcome: Outcome = FINISHED,
    **fields: float,
) -> Sample:
    made = Sample(index, start=0.0, ended=times[-1] if times else 1.0, outcome=outcome, detail="because")
    made.times, made.tokens = array("d", times), array("I", tokens)
    return dataclasses.replace(made, **fields)  # type: ignore[arg-type]


def report(*arguments: str, samples: tuple[Sample, ...] = (), warmup: tuple[Sample, ...] = ()) -> Report:
    chosen = flags(*arguments)
    results, warmed = Results(chosen.objectives), Results()
    for each in samples:
        results.add(each)
    for each in warmup:
        warmed.add(each)
    versions = worker_pb2.Versions(kvbaton="0.1.0", engine="sglang", engine_version="0.5.23")
    model = model_pb2.ModelInfo(
        model=worker_pb2.ModelIdentity(name="smollm2"), runtime=worker_pb2.RuntimeConfig(versions=versions)
    )
    return Report(chosen, "bench-1", datetime.now(UTC), model, results, warmed, Monitor(), interrupted=False)


class TestPercentiles:
    @pytest.mark.parametrize(("share", "expected"), [(50, 50), (90, 90), (99, 99), (100, 100), (0.1, 1)])
    def test_nearest_rank_of_1_to_100(self, share: float, expected: int):
        assert percentile(range(1, 101), share) == expected

    def test_of_one_value_it_is_that_value(self):
        assert Distribution.of([0.25]) == Distribution(1, 0.25, (0.25,) * 4, 0.25)

    def test_of_nothing_everything_is_zero(self):
        assert Histogram().distribution() == Distribution.of([]) == Distribution(0, 0.0, (0.0,) * 4, 0.0)

    def test_a_weight_is_so_many_values(self):
        values = sorted([1.0] * 98 + [2.0, 3.0])
        for share in (50, 98, 99, 100):
            assert weighted_percentile([3.0, 1.0, 2.0], [1, 98, 1], share) == percentile(values, share)
        assert weighted_percentile([], [], 99) == 0

    def test_a_histogram_is_within_half_a_per_cent(self):
        draw, histogram = random.Random(1), Histogram()
        values = [draw.lognormvariate(-4, 2) for _ in range(20_000)]
        for value in values:
            histogram.add(value)
        exact, found = Distribution.of(values), histogram.distribution()
        assert found.percentiles == pytest.approx(exact.percentiles, rel=0.0051)
        assert found.mean == pytest.approx(exact.mean)
        assert (found.count, found.maximum) == (exact.count, exact.maximum)

    def test_a_histogram_takes_what_lies_outside_of_it(self):
        histogram = Histogram()
        histogram.add(0.0, times=98)
        histogram.add(1e9, times=2)
        assert histogram.distribution().percentiles[0] == 0
        assert histogram.distribution().maximum == 1e9


class TestDefinitions:
    def test_a_gap_lies_before_every_message_but_the_first(self):
        assert gaps_between([1.0, 1.5, 3.0], [1, 1, 4]) == Gaps([0.5, 1.5], [1, 4], [0.5, 0.375])

    @pytest.mark.parametrize("times", [(), (1.0,)])
    def test_there_is_none_without_a_second_message(self, times: tuple[float, ...]):
        assert gaps_between(times, [3] * len(times)) == Gaps([], [], [])

    def test_a_message_of_several_tokens_spreads_its_gap_over_them(self):
        results = Results()
        results.add(sample(times=(1.0, 1.4, 2.0), tokens=(2, 4, 1)))
        itl, gaps = results.latency("itl"), results.latency("message_gap")
        assert itl.count == 5
        assert itl.mean == pytest.approx((4 * 0.1 + 0.6) / 5)
        assert itl.percentiles[0] == pytest.approx(0.1, rel=0.01)
        assert (gaps.count, gaps.mean) == (2, pytest.approx(0.5))

    def test_tpot_is_the_mean_of_the_gaps_between_tokens(self):
        assert sample(times=(1.0, 1.4, 2.0), tokens=(2, 4, 1)).tpot == pytest.approx(0.2)
        assert math.isnan(sample(times=(1.0,), tokens=(7,)).tpot)

    def test_open_loop_latencies_begin_when_the_request_was_due(self):
        late = sample(times=(3.0, 4.0), start=1.0, sent=2.5)
        assert (late.ttft, late.e2e, late.send_lag) == (2.0, 3.0, 1.5)

    def test_latencies_are_those_of_finished_requests(self):
        results = Results()
        for each in (sample(), sample(times=(90.0,), tokens=(1,), outcome=NO_WORKER)):
            results.add(each)
        assert (results.latency("ttft").count, results.latency("ttft").maximum) == (1, 1.0)
        assert results.total("output_tokens") == 3

    @pytest.mark.parametrize(
        ("objectives", "good"),
        [
            ("ttft=1", True),
            ("ttft=0.9", False),
            ("itl_p50=0.11,e2e=3", True),
            ("itl_max=0.1", False),
            ("tpot=0.1", False),
        ],
    )
    def test_a_request_is_good_when_every_objective_holds(self, objectives: str, good: bool):
        results = Results(flags("--goodput", objectives).objectives)
        results.add(sample(times=(1.0, 1.1, 1.2, 2.0), tokens=(1, 1, 1, 1)))
        results.add(sample(outcome=NO_WORKER))
        assert results.good == good

    def test_memory_does_not_grow_with_the_length_of_answers(self):
        results = Results()
        long = sample(times=tuple(map(float, range(1, 2001))), tokens=(1,) * 2000)
        for _ in range(10):
            results.add(long)
        columns = [column for _, column in results._columns()]
        assert all(len(column) == 10 for column in columns)
        assert sum(column.itemsize for column in columns) < 100


class TestWorkload:
    def workload(self, *arguments: str, **options: object) -> Workload:
        return Workload(flags(*arguments), **({"vocab_size": 1000} | options))  # type: ignore[arg-type]

    def test_arrivals_are_a_poisson_process_of_that_rate(self):
        arrivals = list(islice(poisson(50.0, seed=3), 20_000))
        between = [b - a for a, b in pairwise(arrivals)]
        assert arrivals == sorted(arrivals)
        assert arrivals[0] > 0
        assert statistics.mean(between) == pytest.approx(1 / 50, rel=0.03)
        assert statistics.stdev(between) == pytest.approx(1 / 50, rel=0.03)
        assert sum(gap > 1 / 50 for gap in between) / len(between) == pytest.approx(math.exp(-1), rel=0.03)

    def test_the_seed_fixes_arrivals_and_requests(self):
        assert list(islice(poisson(5, 1), 9)) == list(islice(poisson(5, 1), 9)) != list(islice(poisson(5, 2), 9))
        arguments = ("--isl", "5:9", "--osl", "1:9", "--cancel-rate", "0.5")
        one, same = self.workload(*arguments), self.workload(*arguments)
        assert [one.planned(i) for i in range(20)] == [same.planned(i) for i in reversed(range(20))][::-1]
        assert one.planned(1) != self.workload(*arguments, "--seed", "1").planned(1)
        assert one.planned(1).message.token_ids != one.planned(1, "-warmup").message.token_ids

    def test_lengths_and_ids_are_uniform_within_their_bounds(self):
        planned = [self.workload("--isl", "5:7", "--osl", "2:3").planned(i).message for i in range(600)]
        assert set(Counter(len(m.token_ids.ids) for m in planned)) == {5, 6, 7}
        assert set(Counter(m.sampling.max_new_tokens for m in planned)) == {2, 3}
        ids = [token for m in planned for token in m.token_ids.ids]
        assert 0 <= min(ids) < 10
        assert 990 < max(ids) < 1000

    def test_answers_are_greedy_and_of_fixed_length_unless_told_otherwise(self):
        usual = self.workload().planned(0).message.sampling
        assert (usual.HasField("temperature"), usual.temperature, usual.ignore_eos) == (True, 0, True)
        other = self.workload("--no-ignore-eos", "--temperature", "0.7").planned(0).message.sampling
        assert (other.temperature, other.ignore_eos) == (0.7, False)

    def test_prompts_begin_with_a_shared_prefix_chosen_by_zipf(self):
        workload = self.workload("--isl", "10", "--prefix-count", "3", "--prefix-length", "8", "--prefix-zipf", "2")
        prompts = [list(workload.planned(i).message.token_ids.ids) for i in range(2000)]
        chosen = Counter(tuple(prompt[:8]) for prompt in prompts)
        assert {len(prompt) for prompt in prompts} == {10}
        weights = [1, 1 / 4, 1 / 9]
        shares = [count / 2000 for _, count in chosen.most_common()]
        assert shares == pytest.approx([weight / sum(weights) for weight in weights], abs=0.03)

    def test_so_many_are_cancelled_at_moments_spread_evenly(self):
        planned = [self.workload("--cancel-rate", "0.3").planned(i).cancel_at for i in range(3000)]
        moments = [moment for moment in planned if moment is not None]
        assert len(moments) / 3000 == pytest.approx(0.3, abs=0.03)
        assert statistics.mean(moments) == pytest.approx(0.5, abs=0.03)

    def test_texts_are_sent_as_they_stand(self, tmp_path: Path):
        file = tmp_path / "prompts.txt"
        file.write_text("one\n\ntwo \n")
        chosen = flags("--text-file", str(file))
        texts = command._texts(chosen)
        assert texts == ["one", "two "]
        workload = Workload(chosen, vocab_size=0, texts=texts)
        assert {workload.planned(i).message.text for i in range(50)} == {"one", "two "}

    def test_without_a_vocabulary_there_are_no_random_prompts(self):
        with pytest.raises(ValueError, match="--text-file"):
            self.workload(vocab_size=0)

    def test_cancellations_fall_into_the_window_or_the_usual_duration(self):
        assert CancelTimes(flags("--cancel-rate", "1", "--cancel-after", "2:4").cancel_window).after(0.5) == 3
        seen = CancelTimes(None)
        seen.saw(2.0)
        seen.saw(4.0)
        assert seen.after(0.5) == 1.5


class TestFlags:
    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["--rate", "1", "--concurrency", "1"], "--rate .* --concurrency"),
            (["--rate", "0"], "--rate: 0"),
            (["--rate", "nan"], "--rate: nan"),
            (["--rate", "fast"], "--rate: 'fast'"),
            (["--concurrency", "0"], "--concurrency: 0"),
            (["--requests", "-1"], "--requests: -1"),
            (["--duration", "inf"], "--duration: inf"),
            (["--isl", "9:5"], "--isl: '9:5'"),
            (["--isl", "0"], "--isl: '0'"),
            (["--osl", "many"], "--osl: 'many'"),
            (["--cancel-rate", "1.5"], "--cancel-rate: 1.5"),
            (["--cancel-after", "1:2"], "--cancel-after needs --cancel-rate"),
            (["--cancel-rate", "1", "--cancel-after", "2:1"], "--cancel-after: '2:1'"),
            (["--prefix-count", "2"], "--prefix-length"),
            (["--isl", "8:20", "--prefix-count", "2", "--prefix-length", "8"], "--prefix-length: 8"),
            (["--text-file", "x", "--isl", "5"], "--text-file .* --isl"),
            (["--goodput", "speed=1"], "--goodput: 'speed'"),
            (["--goodput", "ttft"], "--goodput: 'ttft'"),
            (["--goodput", "ttft=0"], "--goodput: 'ttft=0'"),
            (["--json-requests"], "--json"),
            (["--json", "no/such/folder/report.json"], "--json: "),
            (["--timeout", "0"], "--timeout: 0"),
            (["--channels", "0"], "--channels: 0"),
            (["--tls-cert", "cert.pem"], "--tls-key"),
            (["--tls-ca", "no/such/ca.pem"], "--tls-ca"),
        ],
    )
    def test_a_refusal_names_the_flag(self, arguments: list[str], named: str):
        with pytest.raises(ConfigError, match=named):
            flags(*arguments)

    def test_both_loops_end_by_themselves(self):
        for arguments in ([], ["--rate", "5"], ["--concurrency", "2"]):
            assert (flags(*arguments).request_limit, flags(*arguments).duration_limit) == (100, 60)

    def test_one_bound_that_is_given_stands_alone(self):
        assert flags("--requests", "5").duration_limit == math.inf
        assert flags("--duration", "5").request_limit == math.inf
        both = flags("--duration", "5", "--requests", "7")
        assert (both.duration_limit, both.request_limit) == (5, 7)

    def test_a_missing_text_file_is_named(self, tmp_path: Path):
        with pytest.raises(ConfigError, match="--text-file"):
            command._texts(flags("--text-file", str(tmp_path / "none.txt")))


class TestReport:
    MIXED = (
        sample(0, prompt_tokens=10),
        sample(1, times=(), tokens=(), outcome=NO_WORKER, ended=2.0),
        sample(2, times=(1.0,), tokens=(1,), outcome=Outcome(Kind.CANCELLED), cancel_planned=True),
    )

    def test_json_has_configuration_environment_and_every_number(self, tmp_path: Path):
        file = tmp_path / "r.json"
        made = report("--seed", "7", "--goodput", "ttft=1", "--json", str(file), "--json-requests", samples=self.MIXED)
        read = json.loads(json.dumps(made.as_json(), allow_nan=False))
        assert (read["seed"], read["configuration"]["isl"], read["configuration"]["loop"]) == (7, "128", "closed")
        assert read["environment"]["served"]["runtime"]["versions"]["engine_version"] == "0.5.23"
        counts = read["outcomes"]
        assert [counts[kind] for kind in ("sent", "finished", "cancelled", "interrupted", "error")] == [3, 1, 1, 0, 1]
        assert counts["errors"] == [{"code": "UNAVAILABLE", "reason": "NO_WORKER", "count": 1, "example": "because"}]
        assert counts["finish_reasons"] == {"length": 1}
        throughput = read["throughput"]
        assert (throughput["requests_per_second"], throughput["output_tokens_per_second"]) == (0.5, 1.5)
        assert throughput["input_tokens_per_second"] == 5
        assert set(read["latency"]) == {"ttft", "itl", "tpot", "message_gap", "e2e", "send_lag"}
        assert set(read["latency"]["ttft"]) == {"count", "mean", "p50", "p90", "p95", "p99", "max"}
        assert (read["goodput"]["good"], read["goodput"]["share"]) == (1, 0.5)
        assert [row["outcome"] for row in read["requests"]] == ["finished", "error", "cancelled"]
        assert read["requests"][1]["ttft"] is None

    def test_rows_are_left_out_unless_asked_for(self):
        assert "requests" not in report(samples=self.MIXED).as_json()

    def test_a_run_without_requests_is_a_report_too(self):
        read = json.loads(json.dumps(report().as_json(), allow_nan=False))
        assert read["latency"]["ttft"]["p99"] is None
        assert read["throughput"]["requests_per_second"] == 0
        assert "0 in 0.00 s: none" in report().as_text()

    def test_the_table_has_outcomes_errors_rates_and_percentiles(self):
        text = report("--goodput", "ttft=1", samples=self.MIXED).as_text()
        for part in ("3 in 2.00 s: 1 finished, 1 cancelled, 1 error", "1 UNAVAILABLE NO_WORKER: because"):
            assert part in text
        for part in ("0.50 requests/s", "50.0 % of them (ttft=1)", "TTFT", "p99", "1000.00"):
            assert part in text
        assert "send lag" not in text
        assert "send lag" in report("--rate", "1", samples=self.MIXED).as_text()

    @pytest.mark.parametrize(
        ("expected", "succeeded"), [("", False), ("no_worker", True), ("UNAVAILABLE", True), ("INTERNAL", False)]
    )
    def test_errors_are_unexpected_unless_named(self, expected: str, succeeded: bool):
        assert report("--expect-errors", expected, samples=self.MIXED).succeeded == succeeded

    def test_failures_of_the_warm_up_count_and_are_told(self):
        made = report(warmup=(sample(outcome=NO_WORKER),))
        assert not made.succeeded
        assert "1 of 1 warm-up requests failed" in made.warnings()[0]

    def test_a_generator_that_falls_behind_is_told(self):
        made = report()
        made.monitor._lag.add(0.002, times=98)
        assert made.warnings() == []
        made.monitor._lag.add(0.050, times=2)
        assert "measure the generator" in made.warnings()[0]

    def test_a_generator_without_a_core_to_spare_is_told(self):
        made = report()
        made.monitor._wall, made.monitor._cpu = 10.0, 9.0
        assert "90 % of a core" in made.warnings()[0]
