"""Recipes of benchmarks and experiments load and fit each other; the report is made from raw results."""

import importlib.util
import runpy
from pathlib import Path

import pytest

from experiments import common, report
from jlora.benchmark.options import BenchOptions
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
        groups = common.read_groups(results)
        assert groups, results
        if importlib.util.find_spec("matplotlib"):
            common.draw(module["plot"], groups, tmp_path / "plot.svg")
            assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_the_report_holds_every_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "OUT", tmp_path / "report.html")
    assert report.main() == 0
    page = (tmp_path / "report.html").read_text()
    for folder in FOLDERS:
        assert f'<section id="{folder.name}">' in page
    assert "tok/s" in page
    assert "<script" not in page
