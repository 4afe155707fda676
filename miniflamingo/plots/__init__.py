"""Every figure of the course and of the reports, in one style.

A function takes arrays and returns a matplotlib Figure that belongs to the caller: pyplot's global
state is not touched, nothing is shown and nothing stays open. An image has one colour in all
figures (Okabe and Ito's palette, which colour-blind readers can tell apart), and wherever a colour
says something a number or a word says it too, for print in black and white.
"""

from miniflamingo.plots.attention import plot_areas, plot_attention, plot_turns, plot_weights  # noqa: F401
from miniflamingo.plots.evaluation import plot_dots, plot_episode, plot_shots  # noqa: F401
from miniflamingo.plots.fewshot import plot_never_seen, plot_settings  # noqa: F401
from miniflamingo.plots.gates import (  # noqa: F401
    plot_gate,
    plot_gated_block,
    plot_next_words,
    plot_openings,
)
from miniflamingo.plots.kernels import plot_cost, plot_prediction, plot_roofline  # noqa: F401
from miniflamingo.plots.language import plot_beam, plot_distributions, plot_map, plot_sight  # noqa: F401
from miniflamingo.plots.lines import plot_lines  # noqa: F401
from miniflamingo.plots.phi import (  # noqa: F401
    plot_image_causal_mask,
    plot_mask,
    plot_phi,
    plot_reach,
    plot_work_list,
)
from miniflamingo.plots.plan import plot_plan  # noqa: F401
from miniflamingo.plots.scaling import plot_scaling  # noqa: F401
from miniflamingo.plots.sizes import (  # noqa: F401
    plot_inserted,
    plot_memory,
    plot_occupancy,
    plot_roof,
    plot_sizes,
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
from miniflamingo.plots.triton import (  # noqa: F401
    plot_items,
    plot_orders,
    plot_products,
    plot_programs,
    plot_tiles,
    plot_touched,
)
from miniflamingo.plots.vision import (  # noqa: F401
    plot_clip_latents,
    plot_features,
    plot_keys,
    plot_retrieved,
    plot_signal,
    plot_similarity,
)
