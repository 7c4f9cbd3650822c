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
    models = {f"step {tasks.inspect(run)['global_step']}": load_model(run, device="cpu") for run in runs}
    last = list(models.values())[-1]
    plain = tokens_per_pass(last, WIDTHS, IMAGES)  # temperature 1, top-k 100
    panels: dict[str, Lines] = {
        "top-k 100, by temperature": {
            f"temperature {t:g}": plain if t == 1 else tokens_per_pass(last, WIDTHS, IMAGES, temperature=t)
            for t in TEMPERATURES
        },
        "temperature 1, by top-k": {
            f"top-k {k or 'all'}": plain if k == 100 else tokens_per_pass(last, WIDTHS, IMAGES, top_k=k) for k in TOP_KS
        },
        "by training, temperature 1, top-k 100": {
            step: plain if model is last else tokens_per_pass(model, WIDTHS, IMAGES) for step, model in models.items()
        },
    }
    plot_lookahead(PICTURE, panels)
    for title, lines in panels.items():
        rows = [[label, *(f"{rate:.2f}" for rate in rates.values())] for label, rates in lines.items()]
        print(table([title, *(f"W = {width}" for width in WIDTHS)], rows), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
