"""Classes that no training has seen: accuracy against the shots, or a setting of the training."""

import numpy as np
from matplotlib.figure import Figure

from miniflamingo.plots.style import GREY, IMAGE_COLOURS, INK, LINES, styled

BESIDE = {"ceiling": "ceiling", "nearest_tokens": "nearest mean, visual tokens", "blind": "blind"}


@styled
def plot_settings(curves, label):
    """A panel for each question, a line for each group of classes, its bars from the lowest to the
    highest of Wilson's intervals and the seeds.

    curves {question: {group: {setting: figure}}}, of fewshot.report.curves; label: what the
    settings are. Ceiling, baseline, the blind guess and chance are those of the first group.
    """
    figure = Figure((3.4 * len(curves), 3.2), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for panel, (question, groups) in zip(panels, curves.items()):
        for i, (group, found) in enumerate(groups.items()):
            _draw(panel, found, group, IMAGE_COLOURS[(5, 0, 2)[i % 3]])
        settings = list(next(iter(groups.values())).values())
        for style, (name, text) in zip(LINES[1:], BESIDE.items()):
            values = [f[name] for f in settings]
            panel.plot(values, style, color=INK if name == "ceiling" else GREY, lw=1, label=text)
        panel.axhline(settings[0]["chance"], ls=(0, (1, 4)), color=INK, lw=1, label="chance")
        panel.set(title=question, xlabel=label, ylim=(0, 1.02))
        panel.set_xticks(range(len(settings)), list(next(iter(groups.values()))))
    panels[0].set_ylabel("accuracy")
    panels[0].legend(fontsize=7)
    return figure


@styled
def plot_never_seen(curves):
    """A panel for each task: accuracy against its shots, a line for each group of classes.

    curves {task: {group: {shots: figure}}}, of fewshot.report.by_shots. A figure's bar is Wilson's
    interval over episodes, its band the range of the training seeds. Of the first group stand
    beside: the ceiling, the nearest class mean of the same visual tokens, the blind guess, chance.
    """
    figure = Figure((4.6 * len(curves), 3.6), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for panel, (task, groups) in zip(panels, curves.items()):
        first = list(next(iter(groups.values())).values())
        for i, (group, found) in enumerate(groups.items()):
            colour, x = IMAGE_COLOURS[(5, 0, 2)[i % 3]], np.arange(len(found))
            low, high = np.array([f["range"] for f in found.values()]).T
            panel.fill_between(x, low, high, color=colour, alpha=0.25, lw=0)
            y, bars = ([f[name] for f in found.values()] for name in ("accuracy", "interval"))
            panel.vlines(x, *np.transpose(bars), color=colour)
            panel.plot(x, y, "os^"[i % 3] + "-", color=colour, label=group)
        for style, (name, text) in zip(LINES[1:], BESIDE.items()):
            values = [f[name] for f in first]
            panel.plot(values, style, color=INK if name == "ceiling" else GREY, lw=1, label=text)
        panel.axhline(first[0]["chance"], ls=(0, (1, 4)), color=INK, lw=1, label="chance")
        panel.set(title=task, xlabel="shots", ylim=(0, 1.02))
        panel.set_xticks(range(len(first)), list(next(iter(groups.values()))))
    panels[0].set_ylabel("accuracy")
    panels[-1].legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 0.22))  # above chance
    return figure


def _draw(panel, found, group, colour):
    """One group's line and bars."""
    x, y = np.arange(len(found)), [f["accuracy"] for f in found.values()]
    low, high = (np.array([pick([*f["interval"], *f["range"]]) for f in found.values()])
                 for pick in (min, max))  # fmt: skip
    panel.plot(x, y, "o-", color=colour, label=group)
    panel.vlines(x, low, high, color=colour)
