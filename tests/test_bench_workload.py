"""The workload is what its name says: frequencies, gaps and lengths have the moments of their laws.

Bounds are four or more standard errors of the statistic; seeds are fixed, so nothing is flaky.
"""

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

from jlora.benchmark.lengths import read_lengths
from jlora.benchmark.options import BenchOptions
from jlora.benchmark.workload import Arrivals, Popularity, Workload
from jlora.errors import ParameterError

N = 40_000


def picks(popularity: Popularity, adapters: int, load: Workload | None = None) -> list[int | None]:
    return list(islice((load or Workload(vocab=9)).picks(adapters, popularity, 0), N))


def assert_frequencies(found: list[int | None], chances: list[float]) -> None:
    counts = Counter(found)
    assert set(counts) <= set(range(len(chances)))
    for number, chance in enumerate(chances):
        error = math.sqrt(chance * (1 - chance) / N)
        assert counts[number] / N == pytest.approx(chance, abs=4.5 * error), number


# ---- popularity --------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [1.0, 1.5])
def test_zipf_asks_for_the_kth_adapter_k_to_the_minus_s_as_often(s: float):
    weights = [k**-s for k in range(1, 21)]
    chances = [weight / sum(weights) for weight in weights]
    assert_frequencies(picks("zipf", 20, Workload(vocab=9, zipf_s=s)), chances)


def test_uniform_asks_for_each_adapter_as_often():
    assert_frequencies(picks("uniform", 7), [1 / 7] * 7)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 3.0])
def test_power_has_the_distribution_function_x_to_the_alpha(alpha: float):
    edges = [(k / 10) ** alpha for k in range(11)]
    chances = [high - low for low, high in pairwise(edges)]
    assert_frequencies(picks("power", 10, Workload(vocab=9, power_alpha=alpha)), chances)


def test_distinct_takes_turns_and_identical_takes_the_first():
    assert picks("distinct", 3)[:7] == [0, 1, 2, 0, 1, 2, 0]
    assert set(picks("identical", 3)) == {0}
    assert set(picks("zipf", 0)) == {None}


def test_draws_are_independent():
    """Pairs of neighbours are as frequent as the product of their chances."""
    found = picks("uniform", 3)
    counts = Counter(pairwise(found))
    assert all(abs(count / N - 1 / 9) < 4.5 * math.sqrt(8 / 81 / N) for count in counts.values())


# ---- arrivals ----------------------------------------------------------------------------------


def gaps(arrivals: Arrivals, rate: float, cv: float = 1.0) -> np.ndarray:
    load = Workload(vocab=9, arrivals=arrivals, cv=cv)
    return np.diff([0.0, *islice(load.times(rate, 0), N)])


def test_poisson_gaps_are_exponential_at_the_rate():
    found = gaps("poisson", 4.0) * 4.0
    assert found.mean() == pytest.approx(1, abs=4.5 / math.sqrt(N))
    assert found.std() == pytest.approx(1, abs=9 / math.sqrt(N))
    for bound in (0.1, 1.0, 3.0):
        assert (found > bound).mean() == pytest.approx(math.exp(-bound), abs=0.012)


def test_poisson_counts_have_the_variance_of_their_mean():
    times = np.cumsum(gaps("poisson", 4.0))
    counts = np.bincount((times / 2.0).astype(int))[:-1]  # in windows of two seconds
    assert counts.mean() == pytest.approx(8, rel=0.03)
    assert counts.var() == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0, 4.0])
def test_gamma_keeps_the_rate_and_has_the_coefficient_of_variation(cv: float):
    found = gaps("gamma", 5.0, cv)
    assert found.mean() == pytest.approx(0.2, rel=4.5 * cv / math.sqrt(N))
    assert found.std() / found.mean() == pytest.approx(cv, rel=0.08)


def test_a_closed_loop_has_no_times():
    assert set(gaps("closed", 3.0)) == {0.0}


# ---- lengths -----------------------------------------------------------------------------------


def sizes(**given: object) -> np.ndarray:
    return np.array(list(islice(Workload(vocab=9, **given).sizes(0), N)))  # type: ignore[arg-type]


def test_uniform_lengths_fill_their_bounds_evenly_and_independently():
    found = sizes(lengths="uniform", bounds=(8, 512))
    assert found.min() == 8
    assert found.max() == 512
    error = 505 / math.sqrt(12 * N)
    assert found.mean(axis=0) == pytest.approx([260, 260], abs=4.5 * error)
    assert found.std(axis=0) == pytest.approx([505 / math.sqrt(12)] * 2, rel=0.02)
    assert abs(np.corrcoef(found.T)[0, 1]) < 4.5 / math.sqrt(N)


def test_lognormal_lengths_have_their_medians_and_sigma():
    found = np.log(sizes(lengths="lognormal", input_len=400, output_len=1000, sigma=0.5))
    assert found.mean(axis=0) == pytest.approx(np.log([400, 1000]), abs=0.012)
    assert found.std(axis=0) == pytest.approx([0.5, 0.5], rel=0.02)


def test_lengths_of_a_file_are_its_pairs_equally_often():
    pairs = [(3, 5), (10, 1), (7, 7)]
    counts = Counter(map(tuple, sizes(lengths="file", pairs=pairs).tolist()))
    assert set(counts) == set(pairs)
    assert all(abs(count / N - 1 / 3) < 0.011 for count in counts.values())


def test_requests_are_cut_to_what_the_model_holds():
    found = sizes(lengths="uniform", bounds=(8, 512), max_len=300)
    assert found.min() >= 1
    assert found.sum(axis=1).max() == 300
    assert found[:, 0].max() == 299


# ---- requests ----------------------------------------------------------------------------------


def test_all_cases_get_the_same_lengths_and_times_but_other_tokens():
    load = Workload(vocab=1000, lengths="uniform", bounds=(4, 40), arrivals="poisson")
    one, other = (list(islice(load.requests(0, 8, case=case), 50)) for case in ("base", "merged"))
    assert [(len(r.prompt), r.output_len, r.at) for r in one] == [
        (len(r.prompt), r.output_len, r.at) for r in other
    ]
    assert all(a.prompt != b.prompt for a, b in zip(one, other, strict=True))


def test_prompts_are_distinct_and_come_again_for_the_same_label():
    load = Workload(input_len=8, output_len=4, vocab=100, seed=3)

    def prompts(load: Workload, *label: object, case: str = "a") -> list[tuple[int, ...]]:
        return [tuple(r.prompt) for r in islice(load.requests(*label, case=case), 20)]

    first = prompts(load, 0, 8)
    assert first == prompts(load, 0, 8)
    other_seed = Workload(input_len=8, output_len=4, vocab=100, seed=4)
    every = first + prompts(load, 1, 8) + prompts(load, 0, 8, case="b") + prompts(other_seed, 0, 8)
    assert len(set(every)) == 80
    assert all(len(prompt) == 8 and max(prompt) < 100 for prompt in every)


def test_another_process_draws_the_same():
    code = (
        "from itertools import islice; from jlora.benchmark.workload import Workload\n"
        "load = Workload(vocab=50, lengths='lognormal', arrivals='gamma', cv=2.0)\n"
        "print([(r.at, r.adapter, r.prompt[:3]) for r in islice(load.requests(1, adapters=9,"
        " popularity='zipf'), 5)])"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1


# ---- files -------------------------------------------------------------------------------------


def test_sharegpt_lengths_are_those_of_the_first_two_turns(tmp_path: Path):
    def talk(*texts: str) -> dict[str, object]:
        return {"conversations": [{"from": "human", "value": text} for text in texts]}

    file = tmp_path / "share.json"
    file.write_text(json.dumps([talk("a b c", "d e"), talk("alone"), talk("x", "y z", "more")]))
    words: Callable[[str], int] = lambda text: len(text.split())  # noqa: E731
    assert read_lengths(str(file), words) == [(3, 2), (1, 2)]
    lines = tmp_path / "lengths.jsonl"
    lines.write_text('{"input_len": 4, "output_len": 9}\n\n{"input_len": 1, "output_len": 2}\n')
    assert read_lengths(str(lines), None) == [(4, 9), (1, 2)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "no lengths"),
        ("nonsense", "not readable"),
        ('{"input_len": 0, "output_len": 2}', "entry 1"),
        ('[{"conversations": [{"value": "a"}, {"value": "b"}]}]', "cannot be counted"),
        ("[3]", "entry 1"),
    ],
)
def test_a_wrong_lengths_file_is_refused(tmp_path: Path, text: str, says: str):
    (tmp_path / "f").write_text(text)
    with pytest.raises(ParameterError, match=says):
        read_lengths(str(tmp_path / "f"), None)
    with pytest.raises(ParameterError, match="not readable"):
        read_lengths(str(tmp_path / "absent"), None)


def test_options_reach_the_workload(tmp_path: Path):
    (tmp_path / "f").write_text('{"input_len": 4, "output_len": 9}')
    options = BenchOptions(
        arrivals="gamma", rate=(2.0,), cv=3.0, duration=5.0, lengths="file",
        lengths_file=str(tmp_path / "f"), zipf_s=1.1, power_alpha=0.3, seed=7, length_sigma=0.4,
    )  # fmt: skip
    load = options.workload(99, max_len=50)
    assert load == Workload(
        vocab=99, input_len=64, output_len=64, lengths="file", sigma=0.4, pairs=[(4, 9)],
        max_len=50, zipf_s=1.1, power_alpha=0.3, arrivals="gamma", cv=3.0, seed=7,
    )  # fmt: skip
