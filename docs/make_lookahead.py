"""Writes docs/lookahead.png, and prints its numbers as a table: how many tokens a pass chooses.

``python docs/make_lookahead.py RUN...`` takes run directories or checkpoints of one prior at several training steps,
the last of them trained longest. The counts depend on the weights alone, so other load on the machine does not matter.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tamingfast import load_model, tasks
from tamingfast.evaluation import plot_lookahead, tokens_per_pass
from tamingfast.report import table

PICTURE = Path(__file__).with_name("lookahead.png")
WIDTHS, IMAGES = (1, 2, 4, 8, 16, 32, 64), 10
TEMPERATURES, TOP_KS = (0.5, 0.8, 1.0, 1.2), (10, 100, 1000, None)
Lines = dict[str, dict[int, float]]


def main(runs: list[str]) -> None:
    """Count, plot and print."""
    last = load_model(runs[-1], device="cpu")
    panels: dict[str, Lines] = {
        "top-k 100, by temperature": {
            f"temperature {t}": tokens_per_pass(last, WIDTHS, IMAGES, temperature=t) for t in TEMPERATURES
        },
        "temperature 1, by top-k": {
            f"top-k {k or 'all'}": tokens_per_pass(last, WIDTHS, IMAGES, top_k=k) for k in TOP_KS
        },
        "by training, temperature 1, top-k 100": {
            f"step {tasks.inspect(run)['global_step']}": tokens_per_pass(load_model(run, device="cpu"), WIDTHS, IMAGES)
            for run in runs
        },
    }
    plot_lookahead(PICTURE, panels)
    for title, lines in panels.items():
        rows = [[label, *(f"{rate:.2f}" for rate in rates.values())] for label, rates in lines.items()]
        print(table([title, *(f"W = {width}" for width in WIDTHS)], rows), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
