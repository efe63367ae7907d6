"""Recipes of benchmarks and experiments load and fit each other; the report is made from raw results."""

import importlib.util
import json
import math
import re
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import common, report, show
from jlora.benchmark.options import BenchOptions
from jlora.benchmark.results import read_groups
from jlora.cli import parse

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs" / "bench").glob("*/*.toml"))
FOLDERS = [ROOT / "experiments" / path.stem for path in CONFIGS if path.parent.name == "smoke"]


def test_every_experiment_of_the_issue_is_there():
    assert [folder.name for folder in FOLDERS] == [
        "001_merged_vs_unmerged",
        "002_lora_tax",
        "003_adapter_scaling",
        "004_rank",
        "005_popularity",
        "006_churn",
        "007_tensor_parallel",
        "008_memory",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_loads_and_belongs_to_an_experiment(path: Path):
    options = parse(BenchOptions, ["--config", str(path)])
    assert options.repeats >= 1
    assert path.stem in [folder.name for folder in FOLDERS]
    assert path.parent.name in common.SCALES
    assert "base" in " ".join(options.systems)  # no figure without its baseline in the same run
    if path.parent.name in ("cpu", "h100") and path.stem != "008_memory":
        assert options.repeats >= 3


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_experiment_has_a_readme_and_draws_its_results(folder: Path, tmp_path: Path):
    assert "## Question" in (folder / "README.md").read_text()
    module = runpy.run_path(str(folder / "run.py"))
    for results in sorted((folder / "results").glob("*.jsonl")):
        groups = read_groups(results)
        assert groups, results
        if importlib.util.find_spec("matplotlib"):
            show.draw(module["plot"], groups, tmp_path / "plot.svg")
            assert "<svg" in (tmp_path / "plot.svg").read_text()


def base_was_disturbed(line: dict[str, Any]) -> bool:
    return line["case"]["system"] == "base"


def adapters_were_disturbed(line: dict[str, Any]) -> bool:
    return line["case"]["system"] != "base"


def no_round_was_quiet(line: dict[str, Any]) -> bool:
    return base_was_disturbed(line) == (line["round"] == 0)


@pytest.mark.parametrize(
    "disturbed", [base_was_disturbed, adapters_were_disturbed, no_round_was_quiet]
)
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_experiment_draws_what_it_has_when_runs_were_disturbed(
    folder: Path, disturbed: Callable[[dict[str, Any]], bool], tmp_path: Path
):
    pytest.importorskip("matplotlib")
    recorded = next((folder / "results").glob("*.jsonl"))
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "run":
            line["seen"]["others_cpu"] = 0.5 if disturbed(line) else 0.0
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    groups = read_groups(tmp_path / "r.jsonl")
    assert not any(row["ratio_rounds"] for row in groups[-1].rows if row["system"] != "base")
    show.draw(runpy.run_path(str(folder / "run.py"))["plot"], groups, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    assert all(map(math.isnan, show.error_bars(groups[-1].of("unmerged"))[0]))


@pytest.mark.parametrize("folder", FOLDERS[:6], ids=lambda folder: folder.name)
def test_a_page_shows_its_raw_results(folder: Path):
    """`run.py --scale SCALE --markdown` prints what is missing."""
    text = (folder / "README.md").read_text()
    for results in sorted((folder / "results").glob("*.jsonl")):
        if results.stem in common.SCALES[1:]:  # others are scratch
            for group in read_groups(results):
                table = show.markdown(group).partition("\n\n")[0]
                assert table in text, f"{folder.name} does not show {results.name}"


def test_columns_that_say_nothing_are_left_out():
    (group,) = read_groups(ROOT / "experiments/001_merged_vs_unmerged/results/h100.jsonl")
    head, line, *rows = show.markdown(group).partition("\n\n")[0].splitlines()
    assert "popularity" in head
    assert "evictions" not in head
    assert len({row.count("|") for row in (head, line, *rows)}) == 1
    assert len(rows) == len(group.rows)
    bases = group.of("base")
    alone = show.markdown(replace(group, rows=bases))
    assert alone.startswith("| system | tok/s | spread | of base: median (rounds) |")


def test_the_report_holds_every_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "OUT", tmp_path / "report.html")
    assert report.main() == 0
    page = (tmp_path / "report.html").read_text()
    for folder in FOLDERS:
        assert f'<section id="{folder.name}">' in page
        own = page.partition(f'<section id="{folder.name}">')[2].partition("</section>")[0]
        assert '<div class="answer"><h2>Answer</h2>' in own
        plots = [path for path in (folder / "results").glob("*.svg") if "smoke" not in path.name]
        assert own.count("<svg") == len(plots), folder.name
    assert "All medians" in page
    assert "<script" not in page
    assert "<img" not in page
    ids = set(re.findall(r'id="([^"]+)"', page))
    for target in re.findall(r'<a [^>]*href="([^"]+)"', page):
        if target.startswith("#"):
            assert target == "#" or target[1:] in ids, target
        elif "://" not in target:
            assert (ROOT / "experiments" / target).exists(), target


def test_every_link_of_a_readme_leads_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "experiments").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page}: {target}"


def test_every_figure_of_the_readme_links_to_what_shows_it():
    """Its experiment, or the kernels' page, in the same list item or topic."""
    numbers = (ROOT / "README.md").read_text().split("## Numbers\n")[1].split("\n## ")[0]
    blocks = re.split(r"\n\n(?=\*\*)|\n(?=- )", numbers)
    measured = re.compile(r"\d (?:ms|s|tok/s|MB)\b|0\.\d\d|\d+ times")
    found = [block for block in blocks if measured.search(block)]
    assert len(found) > 8
    for block in found:
        assert "experiments/" in block or "kernels_pallas/README.md" in block, block
