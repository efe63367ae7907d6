"""`python -m experiments.report`: all experiments as one static page, experiments/report.html.

First what was asked and answered; then each experiment's README with its plots in it, and the medians of
the raw results to unfold.
"""

import html
import re
import sys
from pathlib import Path

from markdown_it import MarkdownIt

from experiments.common import SCALES
from experiments.show import device_of, origin
from jlora.benchmark.report import COLUMNS, LEFT, cell
from jlora.benchmark.results import Group, read_groups

HERE = Path(__file__).parent
OUT = HERE / "report.html"

TOP = '<a class="top" href="#">all experiments</a>'

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.6rem; margin: 1rem 0 } h2 { font-size: 1.1rem; margin: 1.6rem 0 .3rem }
p, ul { margin: .4rem 0 } ul { padding-left: 1.3rem }
a { color: #0b5394 }
table { border-collapse: collapse; margin: .8rem 0; font-size: 13px; display: block; overflow-x: auto;
  font-variant-numeric: tabular-nums }
td, th { border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: left; vertical-align: top }
th { border-bottom: 1px solid #888; font-weight: 600 }
.number { text-align: right } td.number { white-space: nowrap }
td:first-child { min-width: 7rem }
code, pre { font-size: 13px; background: #f5f5f5 } pre { padding: .5rem .7rem; overflow-x: auto }
section { border-top: 2px solid #444; margin-top: 3rem; padding-top: .5rem }
.answer { border-left: 4px solid #4477aa; background: #f1f5fa; padding: .2rem .9rem; margin: .8rem 0 }
.answer h2 { margin: .3rem 0 0; font-size: 1rem }
.from, .top { color: #666; font-size: 13px } .top { float: right }
details { margin: .8rem 0 } summary { cursor: pointer; color: #0b5394 }
svg { max-width: 100%; height: auto; display: block; margin: .8rem 0 }
"""


def main() -> int:
    folders = sorted(path.parent for path in HERE.glob("[0-9]*/README.md"))
    index, plan = (HERE / "README.md").read_text(encoding="utf-8").split("\n## How far", 1)
    index = index.replace("# Experiments", "# jlora: experiments", 1)
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name="viewport" content="width=device-width"><title>jlora: experiments</title>'
        f"<style>{STYLE}</style>{linked(render(index), HERE)}"
        + "".join(section(folder) for folder in folders)
        + f'<section id="plan">{TOP}{linked(render("# How far" + plan), HERE)}</section></html>\n'
    )
    OUT.write_text(page, encoding="utf-8")
    print(OUT)
    return 0


def render(markdown: str) -> str:
    """HTML; columns of figures are aligned by class, headings can be linked to as on a forge."""
    page = MarkdownIt("commonmark").enable("table").render(markdown)
    page = re.sub(r' style="text-align:right"', ' class="number"', page)
    return re.sub(
        r"<h2>(.*?)</h2>",
        lambda m: f'<h2 id="{re.sub("[^a-z0-9]+", "-", m[1].lower())}">{m[1]}</h2>',
        page,
    )


def linked(page: str, folder: Path) -> str:
    """Links to other experiments stay in the page; those to files go there from its own folder."""

    def target(match: re.Match[str]) -> str:
        path, _, anchor = match[1].partition("#")
        if "://" in path or not path:
            return match[0]
        found = (folder / path).resolve()
        if found.name == "README.md" and found.parent.parent == HERE:
            return f'href="#{found.parent.name}"'
        if found == HERE / "README.md":
            return f'href="#{anchor}"'
        return f'href="{relative(found)}"'

    return re.sub(r'href="([^"]*)"', target, page)


def relative(path: Path) -> str:
    """A file of the checkout, from the page's folder."""
    try:
        return path.relative_to(HERE).as_posix()
    except ValueError:
        return "../" + path.relative_to(HERE.parent).as_posix()


def section(folder: Path) -> str:
    """README with its plots in it, then the medians."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    page = linked(re.sub(r' id="[^"]*"', "", render(text)), folder)
    page = re.sub(
        r"(<h2>Answer</h2>.*?)(?=<h2>)", r'<div class="answer">\1</div>', page, flags=re.S
    )
    page = re.sub(r'<p><img src="([^"]*)"[^>]*></p>', lambda m: drawing(folder / m[1]), page)
    for scale in SCALES:
        if scale == "smoke":  # says nothing
            continue
        results = folder / "results" / f"{scale}.jsonl"
        plot = results.with_suffix(".svg")
        if plot.exists() and f"results/{plot.name}" not in text:
            page += drawing(plot)
        page += "".join(table(group) for group in read_groups(results))
    return f'<section id="{folder.name}">{TOP}{page}</section>'


def drawing(path: Path) -> str:
    """A plot, in the page itself."""
    drawn = path.read_text(encoding="utf-8")
    return drawn[drawn.index("<svg") :]


def table(group: Group) -> str:
    """The medians of one process's settings, and where they come from."""

    def row(tag: str, cells: dict[str, str]) -> str:
        return "".join(
            f"<{tag}{'' if key in LEFT else ' class=number'}>{html.escape(text)}</{tag}>"
            for key, text in cells.items()
        )

    rows = [row("td", {key: cell(key, one) for key in COLUMNS}) for one in group.rows]
    lines = "".join(f"<tr>{line}</tr>" for line in [row("th", COLUMNS), *rows])
    command = html.escape(group.session["command"])
    where = html.escape(f"{device_of(group)}, {group.session['adapters']} adapters loaded")
    return (
        f"<details><summary>All medians: {where}</summary><table>{lines}</table>"
        f'<p class="from">{html.escape(origin(group))} <code>{command}</code></p></details>'
    )


if __name__ == "__main__":
    sys.exit(main())
