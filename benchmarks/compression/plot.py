#!/usr/bin/env python3
"""Quality against bytes, a panel for each fine-tune: python plot.py OUT/table.json -o plot.png

Needs matplotlib: pip install 'deltazip[plot]'.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METRICS = {
    "kl": ("KL(fine-tune || compressed), nats a token", True),
    "top1": ("share of tokens liked best by both", False),
    "nll": ("NLL of the wanted answers, nats a token", True),
    "accuracy": ("share of right answers", False),
}


def is_ours(name: str) -> bool:
    return name.startswith("deltazip") and "paper" not in name


def frontier(points: Sequence[tuple[float, float]], *, lower_is_better: bool) -> list[int]:
    """Numbers of the points (bytes, quality) that no other beats in both, by bytes."""
    sign = 1.0 if lower_is_better else -1.0
    order = sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1]))
    best, out = float("inf"), []
    for index in order:
        if sign * points[index][1] < best:
            best = sign * points[index][1]
            out.append(index)
    return out


def draw(lines: Sequence[dict[str, Any]], metric: str, axis: str) -> Any:
    """A matplotlib figure. axis: total_bytes or linear_bits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(line["key"]["model"] for line in lines))
    title, is_log = METRICS[metric]
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(7 * len(models), 6), squeeze=False, layout="constrained"
    )
    for model, panel in zip(models, panels[0], strict=True):
        rows = [
            line["row"]
            for line in lines
            if line["key"]["model"] == model
            and line["row"][metric]
            and line["row"]["name"] not in ("fine-tune", "base")
        ]
        if not rows:
            raise ValueError(f"{model}: no row has {metric}")
        scale = 1e6 if axis == "total_bytes" else 1.0
        points = [(row[axis] / scale, row[metric][0]) for row in rows]
        for row, (x, y) in zip(rows, points, strict=True):
            _, low, high = row[metric]
            color = "tab:red" if is_ours(row["name"]) else "tab:gray"
            panel.errorbar(x, y, [[y - low], [high - y]], fmt="o", color=color, capsize=2)
            panel.annotate(row["name"], (x, y), (4, 4), textcoords="offset points", fontsize=7)
        edge = frontier(points, lower_is_better=metric in ("kl", "nll"))
        panel.plot(*zip(*(points[i] for i in edge), strict=True), color="tab:blue", lw=0.8)
        panel.set_xscale("log")
        if is_log:
            panel.set_yscale("log")
        panel.set_title(model)
        panel.set_xlabel("MB, everything" if axis == "total_bytes" else "bits of a linear's weight")
        panel.set_ylabel(title)
    return figure


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="table.json of compare.py")
    parser.add_argument("-o", "--out", type=Path, required=True, help="a .png, .svg or .pdf")
    parser.add_argument("--metric", choices=tuple(METRICS), default="kl")
    parser.add_argument("--axis", choices=("total_bytes", "linear_bits"), default="total_bytes")
    args = parser.parse_args(words)
    try:
        figure = draw(json.loads(args.table.read_text(encoding="utf-8")), args.metric, args.axis)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is needed: pip install 'deltazip[plot]'") from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
