"""What of a device's memory a plan fills, with what."""

from matplotlib.figure import Figure

from miniflamingo.plots.style import GREY, INK, VISIBLE, WRONG, styled

# a part's colour and that of the number in it
PARTS = {
    "frozen weights": ("#d9d9d9", INK),
    "trained weights": (VISIBLE, "white"),
    "gradients": ("#4292c6", INK),
    "moments": ("#9ecae1", INK),
    "master copies": ("#cc79a7", INK),
    "activations": ("#e69f00", INK),
    "logits": ("#f0e442", INK),
    "buffers": ("#009e73", "white"),
}


@styled
def plot_plan(document):
    """Bytes of the fullest device as bars, one a way to spread the model, with what a device has.

    document as `plan` writes it: {"model", "device", "plans": {way: {"memory": {part: bytes},
    "room", "device": {"memory"}}}}. ValueError without a plan.
    """
    if not (plans := document["plans"]):
        raise ValueError("expected plans to draw, got none")
    figure = Figure((8.4, 0.6 * len(plans) + 1.7), layout="constrained")
    axes, most = figure.add_subplot(), 0
    for row, plan in enumerate(plans.values()):
        most = max(most, _draw_parts(axes, row, plan), plan["device"]["memory"] / 1e9)
    first = next(iter(plans.values()))
    for size, name in ((first["device"]["memory"], document["device"]), (first["room"], "room")):
        axes.axvline(size / 1e9, color=WRONG if name == "room" else GREY, ls="--", lw=1)
        axes.annotate(name, (size / 1e9, -0.55), (-3, 0), textcoords="offset points", ha="right",
                      color=GREY, fontsize=8)  # fmt: skip
    devices = f"{first['layout']['devices']:,} x {document['device']}"
    axes.set(title=f"Flamingo-{document['model']} on {devices}", xlabel="GB of the fullest device",
             xlim=(0, 1.1 * most), ylim=(len(plans) - 0.5, -0.8))  # fmt: skip
    axes.set_yticks(range(len(plans)), list(plans))
    axes.tick_params(axis="y", length=0)
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _draw_parts(axes, row, plan):
    """One bar, its parts side by side; returns its length, in GB."""
    left, memory = 0.0, plan["memory"]
    for part, (colour, ink) in PARTS.items():
        width = memory[part] / 1e9
        if width:
            axes.barh(row, width, left=left, height=0.66, color=colour, ec="white", lw=0.6,
                      label=part)  # fmt: skip
        if width > 0.06 * plan["device"]["memory"] / 1e9:
            axes.text(left + width / 2, row, f"{width:.3g}", ha="center", va="center", color=ink,
                      fontsize=8)  # fmt: skip
        left += width
    axes.text(left, row, f" {left:.3g}", va="center", fontweight="bold", fontsize=8)
    return left
