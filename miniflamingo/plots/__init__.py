"""Every figure of the course and of the reports, in one style.

A function takes arrays and returns a matplotlib Figure that belongs to the caller: pyplot's global
state is not touched, nothing is shown and nothing stays open. An image has one colour in all
figures (Okabe and Ito's palette, which colour-blind readers can tell apart), and wherever a colour
says something a number or a word says it too, for print in black and white.
"""

from miniflamingo.plots.evaluation import plot_dots, plot_episode, plot_shots  # noqa: F401
from miniflamingo.plots.kernels import plot_cost, plot_roofline  # noqa: F401
from miniflamingo.plots.lines import plot_lines  # noqa: F401
from miniflamingo.plots.phi import (  # noqa: F401
    plot_image_causal_mask,
    plot_mask,
    plot_phi,
    plot_reach,
    plot_work_list,
)
from miniflamingo.plots.style import (  # noqa: F401
    GREY,
    IMAGE_COLOURS,
    INK,
    MASKED,
    PAPER,
    VISIBLE,
    WRONG,
    image_colour,
)
from miniflamingo.plots.training import (  # noqa: F401
    plot_alphas,
    plot_answers,
    plot_few_shot,
    plot_latents,
    plot_mixture,
)
