"""Accuracy by the number of labels, as a plot."""

from pathlib import Path

from mmssl.apps.finetune.methods import accuracy_interval
from mmssl.apps.finetune.study import PROBE, UNTRAINED, Study
from mmssl.plotting import FAINT, GREEN, drawing

_COLORS = {UNTRAINED: FAINT, PROBE: "#0969da"}
_OTHERS = (GREEN, "#bc4c00", "#8250df")


def draw_study(path: Path, name: str, found: Study) -> None:
    """Write a PNG: one line per classifier, with its 95 % interval as a band.

    Raises:
        UserError: it cannot be written.
    """
    colors = {**_COLORS, **dict(zip(found.tuned(), _OTHERS, strict=False))}
    with drawing(path, 6.4, 4.0, dpi=150, font_size=9) as canvas:
        axes = canvas.add_subplot()
        for way, line in found.lines.items():
            means = [found.mean(way, k) for k in line]
            bands = [accuracy_interval(mean) for mean in means]
            axes.plot(list(line), [100 * m.mean() for m in means], marker="o", color=colors[way], label=way)
            lows, highs = ([100 * band[side] for band in bands] for side in (0, 1))
            axes.fill_between(list(line), lows, highs, color=colors[way], alpha=0.15, linewidth=0)
        if found.zero_shot is not None:
            low, high = (100 * end for end in accuracy_interval(found.zero_shot))
            axes.axhline(100 * found.zero_shot.mean(), color="black", linestyle="--", label="zero-shot")
            axes.axhspan(low, high, color="black", alpha=0.07, linewidth=0)
        ticks = sorted({k for line in found.lines.values() for k in line})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.set(xlabel="labels per class to train on", ylabel="accuracy on the test split (%)", title=name)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
