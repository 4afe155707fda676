"""What there is to look at: one HTML page of a real language model that has learned to see."""

import html
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from miniflamingo import outputs, plots
from miniflamingo.demo import as_figure, as_page
from miniflamingo.real.asking import FRAMES, answer, read_prompt, visual_tokens
from miniflamingo.real.documents import WHAT, WHAT_KIND
from miniflamingo.real.features import picture
from miniflamingo.real.measure import is_named, photographs
from miniflamingo.real.model import SENTENCE
from miniflamingo.real.pictures import UNSEEN, Concepts, compose

MADE = ("index.html", "answers.json")


class Exhibition:
    """Draws the page's figures with one model."""

    def __init__(self, model, words, folder, out):
        self.model, self.words, self.out = model, words, Path(out)
        self.concepts, self.answers = Concepts(Path(folder)), {}

    def ask(self, *parts, most=12):
        """The answer to a prompt."""
        return answer(self.model, self.words, parts, most)

    def sheet(self, name, pictures, truths, question="", columns=6):
        """Pictures, what the model says of each, and the truth where that is another."""
        said = [self.ask(p, *([question] if question else [])) for p in pictures]
        right = [s.lower() == t.lower() for s, t in zip(said, truths)]
        self.answers[name] = [{"truth": t, "answer": s} for t, s in zip(truths, said)]
        texts = [s if ok else f"{s} [{t}]" for s, ok, t in zip(said, right, truths)]
        shown = [np.asarray(p, np.float32) / 255 for p in pictures]
        plots.plot_answers(shown, texts, right, columns).savefig(self.out / f"{name}.png", dpi=110)

    def drawn(self, indices, artist):
        """uint8 pictures of some concepts, plain."""
        return [picture(self.concepts, i, artist, 0) for i in indices]

    def captions(self):
        """Twelve of the artist that no training saw, twelve concepts that none saw."""
        rng = np.random.default_rng(5)
        seen, held = (rng.choice(x, min(12, len(x)), replace=False) for x in
                      (self.concepts.seen, self.concepts.held))  # fmt: skip
        for name, some in (("artist", seen), ("concepts", held)):
            self.sheet(name, self.drawn(some, UNSEEN), [*map(self.concepts.name, some)])

    def kinds(self):
        """What kind of thing is this?"""
        rng = np.random.default_rng(6)
        some = [i for i in self.concepts.held if self.concepts.kind(i)]
        some = rng.choice(some, min(12, len(some)), replace=False)
        kinds = [self.concepts.kind(i) for i in some]
        self.sheet("kinds", self.drawn(some, UNSEEN), kinds, WHAT_KIND)

    def photographs(self):
        """Photographs, of which training saw none."""
        files = photographs()
        frames = [read_prompt([path], self.words)[2][0][0] for path, _ in files.values()]
        said = [self.ask(path) for path, _ in files.values()]
        right = [is_named(s, words) for s, (_, words) in zip(said, files.values())]
        self.answers["photographs"] = [{"file": f, "answer": s} for f, s in zip(files, said)]
        if files:
            sheet = plots.plot_answers(frames, said, right)
            sheet.savefig(self.out / "photographs.png", dpi=110)

    def clip(self):
        """A moving picture: its frames, and which of them the latents read."""
        moving = [i for i in self.concepts.drawn_by("moving", self.concepts.seen)
                  if count_frames(self.concepts.path(i, "moving")) > 1]  # fmt: skip
        i = moving[len(moving) // 3]
        frames = moving_frames(self.concepts.path(i, "moving"))
        features = self.model.encode(frames[None, None])
        maps = self.model.resampler.attention_maps(features)[-1, 0, 0].mean(axis=0)
        S = features.shape[3]
        maps = maps[:, : len(frames) * S].reshape(len(maps), len(frames), round(S**0.5), -1)
        latents = np.argsort(-maps.std(axis=(1, 2, 3)))[:3]
        figure = plots.plot_clip_latents(frames, maps[latents], latents)
        figure.savefig(self.out / "clip.png", dpi=110)
        said = self.ask(list(frames))
        self.answers["clip"] = {"truth": self.concepts.name(i), "answer": said}

    def latents(self):
        """Where the latents look in one picture."""
        image = np.float32(self.drawn([self.concepts.held[3]], UNSEEN)[0]) / 255
        features = self.model.encode(image[None, None, None])
        S = features.shape[3]
        maps = self.model.resampler.attention_maps(features)[-1, 0, 0].mean(axis=0)[:, :S]
        figure = plots.plot_latents(image, maps.reshape(len(maps), round(S**0.5), -1))
        figure.savefig(self.out / "latents.png", dpi=110)

    def dialogue(self):
        """Several pictures in one prompt: phi, and the questions' answers, as they come."""
        held = self.concepts.held
        some = [held[k * len(held) // 4] for k in (1, 2, 3)]
        pictures, parts, turns = self.drawn(some, UNSEEN), [], []
        for image, question in zip(pictures, (WHAT_KIND, WHAT, WHAT_KIND)):
            parts += [image, question]
            said = self.ask(*parts)
            parts.append(said)
            turns.append({"question": question.strip(), "answer": said})
        ids, phi, frames = read_prompt(parts, self.words)
        tokens = [NAMES.get(i) or self.words.decode([i]).strip() or " " for i in ids.tolist()]
        images = [frame[0] for frame in frames]
        plots.plot_phi(tokens, phi, images).savefig(self.out / "dialogue.png", dpi=110)
        for turn, i in zip(turns, some):
            turn["truth"] = f"{self.concepts.name(i)} ({self.concepts.kind(i)})"
        self.answers["dialogue"] = turns

    def shut(self):
        """The same picture with the gates shut; and text alone, beside the language model's."""
        image = self.drawn([self.concepts.seen[len(self.concepts.seen) // 2]], UNSEEN)[0]
        opened = self.ask(image, WHAT)
        gates = [(g, g.alpha_xattn.data, g.alpha_dense.data) for g in self.model.gated_xattn]
        for gate, *_ in gates:
            gate.alpha_xattn.data = gate.alpha_dense.data = np.zeros((), np.float32)
        closed = self.ask(image, WHAT)
        for gate, xattn, dense in gates:
            gate.alpha_xattn.data, gate.alpha_dense.data = xattn, dense
        self.answers["gates"] = {"open": opened, "shut": closed, "equal": self.skill_left()}

    def skill_left(self):
        """Whether text without a picture gets the language model's own logits, bit for bit."""
        ids, phi, _ = read_prompt([SENTENCE], self.words)
        ours = self.model.read(ids[None], visual_tokens(self.model, []), phi[None])
        return bool(np.array_equal(ours, self.model.lm(ids[None])))


NAMES = {0: "<BOS>", 2: "<EOC>", 5: "<image>"}


def count_frames(path):
    """How many pictures a file has: some of the moving ones stand still."""
    with Image.open(path) as image:
        return getattr(image, "n_frames", 1)


def moving_frames(path, most=FRAMES):
    """An animated picture's frames, spread over its length, on white: [T, 224, 224, 3]."""
    with Image.open(path) as image:
        total = getattr(image, "n_frames", 1)
        frames = []
        for n in np.linspace(0, total - 1, min(most, total)).round().astype(int):
            image.seek(int(n))
            frames.append(compose(image.convert("RGBA")))
    return np.float32(np.stack(frames)) / 255


SECTIONS = {
    "alphas": "The gates of a real language model opening: |tanh(alpha)| of the five layers that "
    "were put into SmolLM2-135M. At step 0 the model is its frozen language model.",
    "latents": "Where the resampler's 16 latents look in a picture of a concept never seen.",
    "artist": "Pictures by an artist that no training has seen, and their names as written; in "
    "brackets the right one.",
    "concepts": "Names of concepts that the bridge has never seen, by that artist.",
    "kinds": "What kind of thing is this? Concepts never seen.",
    "photographs": "Photographs. Training has seen drawings alone.",
    "clip": "A moving picture: eight frames, and which of them three latents read.",
    "dialogue": "Several pictures in one prompt, and the one that each token looks at.",
}


def exhibit(model, words, folder, out, alphas, progress=True):
    """Write out/index.html and out/answers.json; what an earlier call put there is replaced."""
    with outputs.staged(out, "real", MADE) as new:
        show = Exhibition(model, words, folder, new)
        works = [show.captions, show.kinds, show.photographs, show.clip, show.latents,
                 show.dialogue, show.shut]  # fmt: skip
        for work in tqdm(works, "figures", disable=not progress):
            work()
        figure = plots.plot_alphas(alphas["steps"], alphas["alpha_xattn"], alphas["alpha_dense"])
        figure.savefig(new / "alphas.png", dpi=110)
        parts = ["<h1>A real language model, a real eye, and a bridge between them</h1>"]
        for name, text in SECTIONS.items():
            if not (new / f"{name}.png").is_file():
                continue
            parts.append(as_figure(new / f"{name}.png", text))
            (new / f"{name}.png").unlink()
        parts.append(_told(show.answers))
        (new / "index.html").write_text(as_page(parts), "utf-8")
        (new / "answers.json").write_text(json.dumps(show.answers, indent=1), "utf-8")
    return show.answers


def _told(answers):
    """The gates shut, the dialogue and the clip, in words."""
    gates, clip = answers["gates"], answers["clip"]
    equal = f"{'' if gates['equal'] else 'NOT '}the language model's own, bit for bit"
    lines = [f"gates open: {gates['open']}", f"gates shut: {gates['shut']}",
             f"logits of a text without a picture: {equal}",
             f"the clip of {clip['truth']}: {clip['answer']}"]  # fmt: skip
    lines += [f"{t['question']} {t['answer']}   [{t['truth']}]" for t in answers["dialogue"]]
    return "<pre>" + html.escape("\n".join(lines)) + "</pre>"
