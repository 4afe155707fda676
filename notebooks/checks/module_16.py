"""Checks of module 16: what is trained, open gates, nats a token, ranking, IDEFICS' names."""

import re

import numpy as np

from miniflamingo.interop import idefics
from miniflamingo.interop.names import below, places

from .core import Wrong, as_array, call, exercise, expect, named, several

# --- 16.1: how much of it is trained --------------------------------------------------------------

PARTS = ("gated_xattn.", "resampler.")
MODELS = (
    {"lm.embedding.weight": (7, 4), "lm.norm.weight": (4,), "gated_xattn.0.alpha_xattn": (),
     "gated_xattn.0.alpha_dense": (), "gated_xattn.0.ffw.up.weight": (5, 4),
     "resampler.latents": (2, 3), "vision_encoder.resampler.weight": (3, 3, 2)},
    {"vision_encoder.patch": (2, 2, 3, 5), "resampler.layers.10.ffw.up.weight": (6, 5),
     "gated_xattn.1.norm.bias": (9,), "gated_xattn.1.alpha_dense": (), "lm.head.weight": (8, 9)},
)  # fmt: skip


@exercise("16.1")
def trained(answer):
    """answer({name: shape}, parts) -> float[2]: numbers that are trained, their share of all."""
    for shapes in MODELS:
        right = trained_numbers(shapes, PARTS)
        expect(call(answer, shapes, PARTS), right, _trained_mistakes(shapes, right))


def trained_numbers(shapes, parts):
    """How many numbers belong to some parts, and what share of all that is."""
    sizes = {name: int(np.prod(shape, dtype=int)) for name, shape in shapes.items()}
    own = sum(size for name, size in sizes.items() if name.startswith(tuple(parts)))
    return np.array([own, own / sum(sizes.values())])


def _trained_mistakes(shapes, right):
    own, share = right
    every = own / share
    scalars = sum(not shape for name, shape in shapes.items() if name.startswith(PARTS))
    sums = [sum(sum(shape) for name, shape in shapes.items() if name.startswith(some))
            for some in (PARTS, "")]  # fmt: skip
    names = [sum(name.startswith(some) for name in shapes) for some in (PARTS, "")]
    inside = sum(np.prod(shape, dtype=int) for name, shape in shapes.items()
                 if any(part in name for part in PARTS))  # fmt: skip
    yield (
        "a gate has the shape [] and is one number: the product of no sizes is 1, not 0",
        [own - scalars, (own - scalars) / (every - scalars)],
    )
    yield "a part is what a name BEGINS with: use startswith, not `in`", [inside, inside / every]
    yield "numbers are counted, not tensors", [names[0], names[0] / names[1]]
    yield "a tensor's numbers are the PRODUCT of its sizes", [sums[0], sums[0] / sums[1]]
    yield "the share is of all numbers, not of the frozen ones", [own, own / (every - own)]
    yield "this is what is frozen: the trained parts are wanted", [every - own, 1 - share]
    yield "the share is that of the trained numbers, not of the frozen ones", [own, 1 - share]
    yield "a share is between 0 and 1, not per cent", [own, 100 * share]
    yield "the count comes first, then the share", [share, own]
    yield "the second number is a share of all numbers, not all numbers", [own, every]
    yield "two numbers are wanted: the count and the share", own
    yield "two numbers are wanted: the count and the share", share


# --- 16.2: the gates that are open ----------------------------------------------------------------

GATES = (
    (np.array([[0.0, 0, 0, 0], [0.6, -0.2, 0.8, -0.1], [0.1, -0.7, 0.52, 0.9]]),
     np.array([4, 10, 16, 22]), 0.5),
    (np.array([[-0.9, 0.1, 0.2], [0.1, -1000.0, 0.26], [0.05, 1000.0, -0.24]]),
     np.array([3, 7, 11]), 0.2),
)  # fmt: skip


@exercise("16.2")
def opened(answer):
    """answer(alphas [steps, layers], blocks int[layers], least) -> int[n]."""
    for case in GATES:
        expect(call(answer, *case), open_blocks(*case), _open_mistakes(*case))


def open_blocks(alphas, blocks, least):
    """The blocks whose gate is open by at least `least` at the end."""
    return blocks[abs(np.tanh(alphas[-1])) >= least]


def _open_mistakes(alphas, blocks, least):
    opening = abs(np.tanh(alphas[-1]))
    chosen = opening >= least
    e = np.exp(np.stack([alphas[-1], -alphas[-1]]))
    naive = abs((e[0] - e[1]) / (e[0] + e[1]))
    yield (
        "a gate of -0.7 is as open as one of 0.7: take the absolute value",
        blocks[np.tanh(alphas[-1]) >= least],
    )
    yield (
        "alpha is not yet the gate: the branch is multiplied by tanh(alpha)",
        blocks[abs(alphas[-1]) >= least],
    )
    yield (
        "exp of a large alpha is infinite, and inf / inf is no number: use np.tanh",
        blocks[naive >= least],
    )
    yield (
        "these are places among the gated layers: which BLOCKS they stand before is wanted",
        (np.flatnonzero(chosen)),
    )
    yield (
        "what is wanted is the end of the training: the last row",
        blocks[(abs(np.tanh(alphas)) >= least).any(axis=0)],
    )
    yield (
        "this is the first row: the end of the training is the last one",
        blocks[abs(np.tanh(alphas[0])) >= least],
    )
    yield (
        "this is the mean over the steps: the end is wanted, the last row",
        blocks[abs(np.tanh(alphas)).mean(axis=0) >= least],
    )
    yield "these are the blocks whose gates stayed shut", blocks[~chosen]
    yield "the blocks' numbers are wanted, not a truth for each", chosen
    yield "the blocks' numbers are wanted, not how open their gates are", opening[chosen]
    order = np.argsort(-opening[chosen], kind="stable")
    yield "in the order of the blocks, not of how open they are", blocks[chosen][order]


# --- 16.3: what the picture is worth --------------------------------------------------------------


def _gain_cases():
    for seed, P in ((0, 6), (1, 9)):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(1, 7, P)
        right = rng.gamma(2, 1, P) * tokens
        another = right + rng.normal(3, 2, P) * tokens**1.5
        yield right, another, tokens, rng.integers(0, P, (60, P))


@exercise("16.3")
def gain(answer):
    """answer(right [P], another [P], tokens int[P], rows int[resamples, P]) -> float[3]."""
    for case in _gain_cases():
        expect(call(answer, *case), gain_of(*case), _gain_mistakes(*case))


def gain_of(right, another, tokens, rows):
    """The gain, nats a token, and the limits of 95 % of its resamples."""
    saved = another - right
    drawn = saved[rows].sum(axis=1) / tokens[rows].sum(axis=1)
    return np.array([saved.sum() / tokens.sum(), *np.quantile(drawn, (0.025, 0.975))])


def _gain_mistakes(right, another, tokens, rows):
    saved = another - right
    value, low, high = gain_of(right, another, tokens, rows)
    drawn = saved[rows].sum(axis=1) / tokens[rows].sum(axis=1)
    ratios = saved / tokens
    means = ratios[rows].mean(axis=1)
    quantiles = lambda x: np.quantile(x, (0.025, 0.975))  # noqa: E731
    yield "the other picture's nats minus the right one's: this is negative", [-value, -high, -low]
    yield "sums first, then the quotient: a long name has more tokens, and counts more", [
        ratios.mean(), *quantiles(means)]  # fmt: skip
    yield "sums first, then the quotient, in the resamples, too", [value, *quantiles(means)]
    yield "nats a TOKEN: divide by the tokens, not by the pictures", [
        saved.mean(), *quantiles(saved[rows].mean(axis=1))]  # fmt: skip
    yield "nats a token: the sums are not divided yet", [
        saved.sum(), *quantiles(saved[rows].sum(axis=1))]  # fmt: skip
    yield "a resample has tokens of its own: divide by the sum of tokens[rows]", [
        value, *quantiles(saved[rows].sum(axis=1) / tokens.sum())]  # fmt: skip
    yield "axis=1 is the pictures of one resample", [
        value, *quantiles(saved[rows].sum(axis=0) / tokens[rows].sum(axis=0))]  # fmt: skip
    yield "95 % lie between the quantiles 0.025 and 0.975", [
        value, *np.quantile(drawn, (0.05, 0.95))]  # fmt: skip
    yield "these are the least and the largest resample: 0.025 and 0.975 are wanted", [
        value, drawn.min(), drawn.max()]  # fmt: skip
    yield "quantiles of the resamples are wanted, not a deviation", [
        value, value - 1.96 * drawn.std(), value + 1.96 * drawn.std()]  # fmt: skip
    yield "quantiles of the resamples are wanted, not a deviation", [
        value, value - drawn.std(), value + drawn.std()]  # fmt: skip
    yield "the lower limit comes first", [value, high, low]
    yield "the gain itself is of all pictures, not the mean of the resamples", [
        drawn.mean(), low, high]  # fmt: skip
    yield "the gain itself is of all pictures, not the median of the resamples", [
        np.median(drawn), low, high]  # fmt: skip
    yield "these are the right picture's nats alone", [right.sum() / tokens.sum(), low, high]
    yield "three numbers are wanted: the gain and its two limits", value
    yield "three numbers are wanted: the gain and its two limits", [low, high]


# --- 16.4: which of ten names ---------------------------------------------------------------------


def _rank_cases():
    for seed, (P, A, n) in ((10, (14, 14, 5)), (11, (12, 15, 4)), (16, (10, 16, 6))):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(1, 6, A)
        nats = np.round(rng.gamma(3, 1, (P, A)) * tokens + rng.gamma(2, 2, A), 1)
        nats[np.arange(P), np.arange(P)] *= 0.45
        others = [rng.permutation(np.delete(np.arange(A), p))[: n - 1] for p in range(P)]
        candidates = np.column_stack([np.arange(P), others])
        nats[0, candidates[0, 1]] = nats[0, 0]  # a tie
        tokens[candidates[0, 1]] = tokens[0]
        yield nats, tokens, candidates, rng.integers(0, P, (60, P))


@exercise("16.4")
def ranked(answer):
    """answer(nats [P, A], tokens int[A], candidates int[P, n], rows int[resamples, P]) -> two."""
    for case in _rank_cases():
        right = ranked_of(*case)
        names = "the pair (shares [3], interval [2])"
        shares, interval = several(call(answer, *case), right, names, shapes=False)
        expect(shares, right[0], _rank_mistakes(*case[:3]), named("the first, the shares"))
        expect(interval, right[1], _interval_mistakes(*case), named("the second, the interval"))


def scores_of(nats, tokens):
    """Nats, nats a token, and nats a token less the mean over the other pictures, each [P, A]."""
    others = (nats.sum(axis=0) - nats) / (len(nats) - 1)
    return nats, nats / tokens, (nats - others) / tokens


def first_is_least(scores, candidates):
    """The share of rows in which the first candidate's score is less than all others'."""
    own = np.take_along_axis(scores, candidates, axis=1)
    return (own[:, 0] < own[:, 1:].min(axis=1)).mean()


def shares_of(nats, tokens, candidates):
    """How often the first candidate is found, by each of the three scores."""
    return np.array([first_is_least(scores, candidates) for scores in scores_of(nats, tokens)])


def hits_of(nats, tokens, candidates):
    """bool [3, P]: whether each score finds the first candidate of each picture."""
    own = [np.take_along_axis(s, candidates, axis=1) for s in scores_of(nats, tokens)]
    return np.array([s[:, 0] < s[:, 1:].min(axis=1) for s in own])


def ranked_of(nats, tokens, candidates, rows):
    """The three shares, and the interval of the third minus the second, picture by picture."""
    hits = hits_of(nats, tokens, candidates).astype(float)
    drawn = (hits[2] - hits[1])[rows].mean(axis=1)
    return hits.mean(axis=1), np.quantile(drawn, ENDS)


ENDS = 0.025, 0.975


def _interval_mistakes(nats, tokens, candidates, rows):
    hits = hits_of(nats, tokens, candidates).astype(float)
    right = ranked_of(nats, tokens, candidates, rows)[1]
    drawn = hits[:, rows].mean(axis=2)  # [3, resamples]
    each = np.quantile(drawn, ENDS, axis=1).T  # [3, 2]
    gained = (hits[2] - hits[1])[rows]
    yield "the sign: the share of s3 MINUS that of s2", -right[::-1]
    yield "the sign: the share of s3 MINUS that of s2", -right
    yield "this is the interval of s3's share alone: of the difference to s2's", each[2]
    yield "this is the interval of s2's share alone: of the difference, s3's minus it", each[1]
    yield "s3 minus s2, not minus s1", np.quantile(drawn[2] - drawn[0], ENDS)
    yield (
        "ends of two intervals are subtracted: take the difference in each resample, and THEN its "
        "quantiles",
        each[2] - each[1],
    )
    yield (
        "ends of two intervals are subtracted: take the difference in each resample, and THEN its "
        "quantiles",
        each[2] - each[1][::-1],
    )
    yield (
        "the quantiles 0.025 and 0.975: these are 0.05 and 0.95",
        np.quantile(gained.mean(axis=1), (0.05, 0.95)),
    )
    yield "shares are wanted, not counts: each resample's mean", right * len(nats)
    yield (
        "the mean is over the pictures of a resample, axis 1, not over the resamples",
        (np.quantile(gained.mean(axis=0), ENDS)),
    )
    yield "quantiles of single pictures: first the mean of each resample", np.quantile(gained, ENDS)
    yield (
        "first the mean of each resample, then two quantiles over the resamples",
        np.quantile(hits[2] - hits[1], ENDS),
    )
    middle, spread = gained.mean(), 1.96 * gained.mean(axis=1).std()
    yield (
        "the quantiles of the resamples are wanted, not 1.96 deviations",
        np.array([middle - spread, middle + spread]),
    )
    yield "the smaller quantile first", right[::-1]
    yield (
        "two ends are wanted, without the difference itself",
        np.array([(hits[2] - hits[1]).mean(), *right]),
    )
    turned = hits[2][rows] - hits[1][rows[::-1]]
    yield "both scores are asked of the SAME resample", np.quantile(turned.mean(axis=1), ENDS)


def _rank_mistakes(nats, tokens, candidates):
    right = shares_of(nats, tokens, candidates)
    scores, P = scores_of(nats, tokens), len(nats)
    own = [np.take_along_axis(s, candidates, axis=1) for s in scores]
    share = lambda s: first_is_least(s, candidates)  # noqa: E731
    yield "few nats are likely: the LEAST is the choice, not the largest", [
        (s[:, 0] > s[:, 1:].max(axis=1)).mean() for s in own]  # fmt: skip
    yield "a tie is no hit: argmin, which takes the first of equals, sides with the right name", [
        (s[:, 0] <= s[:, 1:].min(axis=1)).mean() for s in own]  # fmt: skip
    yield "the choice is among the picture's candidates, not among all names", [
        (s.argmin(axis=1) == candidates[:, 0]).mean() for s in scores]  # fmt: skip
    yield "shares are wanted, not counts", right * P
    yield "the third score is a token's, too: divide by the tokens", [
        *right[:2], share(tokens * scores[2])]  # fmt: skip
    yield "the mean is over the other PICTURES of one name, not over the other names", [
        *right[:2], share((nats - nats.mean(axis=1, keepdims=True)) / tokens)]  # fmt: skip
    yield "the mean of the others is taken from the nats of this name, not from its nats a token", [
        *right[:2], share(nats / tokens - (nats.sum(axis=0) - nats) / (P - 1))]  # fmt: skip
    yield "minus the others' mean, not divided by it", [
        *right[:2], share(nats / ((nats.sum(axis=0) - nats) / (P - 1)))]  # fmt: skip
    yield "a token's nats are fewer, not more: divide by the tokens", [
        right[0], share(nats * tokens), right[2]]  # fmt: skip
    yield "the tokens of a candidate are tokens[candidates]", [
        right[0], *[(lambda s: (s[:, 0] < s[:, 1:].min(axis=1)).mean())(
            raw / tokens[: candidates.shape[1]])
            for raw in (own[0], own[2] * tokens[candidates])]]  # fmt: skip
    yield "three shares are wanted, one for each score", right[0]
    yield "the order is: nats, nats a token, less the others' mean", right[[1, 0, 2]]


# --- 16.5: IDEFICS' names -------------------------------------------------------------------------

BRIDGE = r"model\.(gated_cross_attn_layers|perceiver_resampler)\."
TABLE = (
    *below(r"model\.gated_cross_attn_layers\.(\d+)\.", idefics.GATED, "gated_xattn.#."),
    *below(r"model\.perceiver_resampler\.", idefics.RESAMPLER, "resampler."),
)
UNKNOWN = (
    "model.gated_cross_attn_layers.1.cross_attn.proj_q.weight",
    "model.perceiver_resampler.blocks.0.2.fc.weight",
    "model.perceiver_resampler.latents_of_text",
    "model.gated_cross_attn_layers.0.input_layernorm.weight_of_more",
)


def renamed(names):
    """{our name: their name} of the bridge's tensors."""
    own = [name for name in names if re.match(BRIDGE, name)]
    return {ours: theirs[0][0] for ours, theirs in places(own, TABLE).items()}


@exercise("16.5")
def rename(answer):
    """answer([their name]) -> {our name: their name}; ValueError for an unknown one."""
    for depth, every in ((4, 2), (24, 2)):
        names = list(their_shapes(depth, every))
        right, got = renamed(names), call(answer, names)
        if not isinstance(got, dict):
            shape = list(as_array(got).shape)
            raise Wrong(f"wrong shape: {{our name: their name}} is wanted, got an array {shape}")
        got = {str(ours): str(theirs) for ours, theirs in got.items()}
        _compare_names(got, right, names)
    for name in UNKNOWN:
        _must_refuse(answer, [*names[:3], name])


def _compare_names(got, right, names):
    left = [n for pair in got.items() for n in pair if n in names and not re.match(BRIDGE, n)]
    if left:
        raise Wrong(f"{left[0]} is of a frozen part: only the bridge is wanted")
    if got and all(name in names for name in got):
        raise Wrong("{our name: their name} is wanted: here their names come first")
    for ours, theirs in right.items():
        if ours not in got:
            _name_missing(ours, theirs, got)
        if got[ours] != theirs:
            raise Wrong(f"{ours} is {theirs} there, not {got[ours]}")
    if extra := [name for name in got if name not in right]:
        raise Wrong(f"{extra[0]!r} is no name of ours")


def _name_missing(ours, theirs, got):
    if re.search(r"\.\d\d\.", ours) and re.sub(r"\.\d\d\.", ".1.", ours) in got:
        raise Wrong(f"{ours} is missing: a layer's number may have two digits")
    for wrong, found in got.items():
        if found == theirs:
            raise Wrong(f"{theirs} is called {ours} here, not {wrong}")
    raise Wrong(f"missing: {ours} ({theirs})")


def _must_refuse(answer, names):
    try:
        call(answer, names)
    except Wrong as wrong:
        if "ValueError" not in str(wrong):
            raise
        return
    raise Wrong(f"{names[-1]} stands in no table, and you let it pass: raise ValueError, so that "
                "nothing is lost in silence (and compare WHOLE names)")  # fmt: skip


# --- a small IDEFICS ------------------------------------------------------------------------------


def their_shapes(depth=4, every=2, D=24, F=36, D_v=16, R=3, HK=10, words=(40, 2)):
    """{their name: shape} of an IDEFICS of these sizes: language model, gated layers, resampler,
    eye."""
    V, more = words
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,),
              "model.embed_tokens.additional_embedding.weight": (more, D),
              "lm_head.weight": (V, D), "lm_head.additional_fc.weight": (more, D)}  # fmt: skip
    for i in range(depth):
        shapes |= _block(f"model.layers.{i}.", "self_attn", D, D, F)
    for j in range(-(-depth // every)):
        at = f"model.gated_cross_attn_layers.{j}."
        shapes |= _block(at, "cross_attn", D, D_v, F)
        shapes |= {f"{at}alpha_cross_attn": (1,), f"{at}alpha_dense": (1,)}
    return shapes | _resampler(D_v, R, HK) | _eye(D_v)


def _block(at, attention, D, D_in, F):
    shapes = {f"{at}{n}_layernorm.weight": (D,) for n in ("input", "post_attention")}
    shapes |= {f"{at}{attention}.{n}_proj.weight": (D, D_in if n in "kv" else D) for n in "qkvo"}
    shapes |= {f"{at}mlp.{n}_proj.weight": (F, D) for n in ("gate", "up")}
    return shapes | {f"{at}mlp.down_proj.weight": (D, F)}


def _resampler(D, R, HK, depth=2):
    at = "model.perceiver_resampler."
    shapes = {f"{at}latents": (R, D)} | _norm(f"{at}layer_norm", D)
    for i in range(depth):
        first, second = f"{at}blocks.{i}.0.", f"{at}blocks.{i}.1."
        shapes |= _norm(f"{first}context_layer_norm", D) | _norm(f"{first}latents_layer_norm", D)
        shapes |= {f"{first}{n}_proj.weight": (HK, D) for n in "qkv"}
        shapes |= {f"{first}output_proj.weight": (D, HK), **_norm(f"{second}ln", D)}
        shapes |= {f"{second}fc.weight": (4 * D, D), f"{second}c_proj.weight": (D, 4 * D)}
    return shapes


def _eye(D):
    at = "model.vision_model."
    shapes = {f"{at}embeddings.class_embedding": (D,),
              f"{at}embeddings.patch_embedding.weight": (D, 3, 4, 4),
              f"{at}embeddings.position_embedding.weight": (5, D)}  # fmt: skip
    shapes |= _norm(f"{at}pre_layrnorm", D) | _norm(f"{at}post_layernorm", D)
    layer = f"{at}encoder.layers.0."
    for n in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= {f"{layer}self_attn.{n}.weight": (D, D), f"{layer}self_attn.{n}.bias": (D,)}
    shapes |= {f"{layer}mlp.fc1.weight": (24, D), f"{layer}mlp.fc1.bias": (24,),
               f"{layer}mlp.fc2.weight": (D, 24), f"{layer}mlp.fc2.bias": (D,)}  # fmt: skip
    return shapes | _norm(f"{layer}layer_norm1", D) | _norm(f"{layer}layer_norm2", D)


def _norm(name, D):
    return {f"{name}.weight": (D,), f"{name}.bias": (D,)}


THEIR_CONFIG = {
    "model_type": "idefics", "vocab_size": 40, "additional_vocab_size": 2, "hidden_size": 24,
    "intermediate_size": 36, "num_hidden_layers": 4, "num_attention_heads": 3,
    "cross_layer_interval": 2, "rms_norm_eps": 1e-6, "hidden_act": "silu", "alpha_type": "float",
    "qk_layer_norms": False, "use_resampler": True, "tie_word_embeddings": False,
    "perceiver_config": {"resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 2,
                         "resampler_head_dim": 5, "qk_layer_norms_perceiver": False},
    "vision_config": {"embed_dim": 16, "image_size": 8, "patch_size": 4, "intermediate_size": 24,
                      "num_hidden_layers": 1, "num_attention_heads": 2},
}  # fmt: skip


def their_checkpoint(seed=0):
    """config.json as a dict and {name: float32 array} of a small random IDEFICS, gates open."""
    rng, state = np.random.default_rng(seed), {}
    for name, shape in their_shapes().items():
        scale = 0.5 if "alpha" in name else 0.2
        one = "norm" in name and name.endswith("weight")
        state[name] = (one + rng.normal(0, scale, shape)).astype(np.float32)
    return THEIR_CONFIG, state
