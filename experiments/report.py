"""`python -m experiments.report`: all experiments as one static page, experiments/report.html.

Each section is the experiment's README, its plots and its tables, straight from the raw results.
"""

import html
import re
import sys
from pathlib import Path

from markdown_it import MarkdownIt

from experiments.common import SCALES, Group, read_groups
from jlora.benchmark.report import COLUMNS, cell

HERE = Path(__file__).parent
OUT = HERE / "report.html"

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px }
td, th { border-bottom: 1px solid #ddd; padding: .2rem .6rem; text-align: right }
td:first-child, th:first-child { text-align: left }
code, pre { font-size: 13px; background: #f5f5f5; overflow-x: auto }
section { border-top: 2px solid #444; margin-top: 3rem }
.from { color: #666; font-size: 12px }
svg { max-width: 100%; height: auto }
"""


def main() -> int:
    folders = sorted(path.parent for path in HERE.glob("[0-9]*/README.md"))
    links = "".join(f'<li><a href="#{f.name}">{f.name}</a></li>' for f in folders)
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>jlora: experiments</title>"
        f"<style>{STYLE}</style><h1>jlora: experiments</h1><ul>{links}</ul>"
        + "".join(section(folder) for folder in folders)
        + "</html>\n"
    )
    OUT.write_text(page, encoding="utf-8")
    print(OUT)
    return 0


def section(folder: Path) -> str:
    """README, plots, tables."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    page = MarkdownIt("commonmark").enable("table").render(text)
    parts = [re.sub(r"<p><img [^>]*></p>", "", page)]  # plots follow, in the page itself
    for scale in SCALES:
        if scale == "smoke":  # says nothing
            continue
        results = folder / "results" / f"{scale}.jsonl"
        plot = results.with_suffix(".svg")
        if plot.exists():
            drawn = plot.read_text(encoding="utf-8")
            parts.append(drawn[drawn.index("<svg") :])
        parts += [table(group) for group in read_groups(results)]
    return f'<section id="{folder.name}">{"".join(parts)}</section>'


def table(group: Group) -> str:
    """The medians of one process's settings, and where they come from."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS.values())
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell(key, row))}</td>" for key in COLUMNS) + "</tr>"
        for row in group.rows
    )
    session = group.session
    device = session.get("device") or {}
    where = (
        f"{session['command']} · commit {', '.join(group.commits)} · {device.get('count')} "
        f"{device.get('kind')} ({session['host']['cpu']}, {session['host']['cores']} cores) · "
        f"jax {session['versions']['jax']}"
    )
    return f'<table><tr>{head}</tr>{rows}</table><p class="from">{html.escape(where)}</p>'


if __name__ == "__main__":
    sys.exit(main())
