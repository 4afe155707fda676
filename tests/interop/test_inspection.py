"""`inspect`: what a checkpoint is, from names and alphas alone."""

import io

import numpy as np
import pytest
from PIL import Image

from miniflamingo.__main__ import main
from miniflamingo.interop import inspection
from miniflamingo.interop.files import Checkpoint, open_checkpoint
from miniflamingo.module import save_tensors
from miniflamingo.training import WEIGHTS
from tests.interop import made
from tests.interop.agreement import Peer


class Reads(Checkpoint):
    """Says which tensors were read."""

    def __getitem__(self, name):
        self.read = [*getattr(self, "read", []), name]
        return super().__getitem__(name)


def lines(path):
    checkpoint = open_checkpoint(path)
    checkpoint.__class__ = Reads
    project = inspection.name_of(checkpoint)
    gates = inspection.gates_of(checkpoint)
    text = "\n".join(inspection.report(checkpoint, project, gates))
    return project, gates, text, getattr(checkpoint, "read", [])


@pytest.mark.parametrize("stage", ["lm", "vision", "flamingo"])
def test_our_own(stage):
    project, gates, text, read = lines(WEIGHTS / stage / "model.safetensors")
    assert project == "miniflamingo" and "every name is understood" in text
    assert all("alpha" in name for name in read)
    assert len(gates["attention"]) == len(gates["dense"]) == 3 * (stage == "flamingo")
    assert ("no gates" in text) == (stage != "flamingo")


def test_a_llama(tmp_path):
    folder = made.save_folder(tmp_path / "m", made.LLAMA, made.llama_state(), 2)
    project, _, text, read = lines(folder)
    assert project == "llama" and not read
    assert "language model                 29" in text and "hidden_size" in text


def test_a_name_that_nobody_knows_is_shown(tmp_path):
    state = made.llama_state() | {"surprise.weight": np.ones(3, np.float32)}
    folder = made.save_folder(tmp_path / "m", made.LLAMA, state)
    assert lines(folder)[2].endswith("1 names are not understood: surprise.weight")
    save_tensors(tmp_path / "x.safetensors", {"surprise\n.weight": np.ones(3)})
    with pytest.raises(ValueError, match=r"is of none of .* names are surprise\\n\.weight"):
        lines(tmp_path / "x.safetensors")


@pytest.mark.parametrize("vector", [False, True])
def test_a_random_idefics(tmp_path, vector):
    pytest.importorskip("transformers")
    from tests.interop.theirs import save_idefics

    model = save_idefics(tmp_path / "m", vector=vector)
    project, gates, text, read = lines(tmp_path / "m")
    assert project == "idefics" and "every name is understood" in text and len(read) == 6
    for i, layer in enumerate(model.model.gated_cross_attn_layers):
        for kind, alpha in (("attention", layer.alpha_cross_attn), ("dense", layer.alpha_dense)):
            expected = abs(np.tanh(alpha.detach().numpy().ravel()))
            np.testing.assert_allclose(gates[kind][i], expected, rtol=1e-6)
    counted = sum(p.numel() for p in model.model.gated_cross_attn_layers.parameters())
    assert f"{inspection.short(counted):>12}" in text


def test_a_random_mllama(tmp_path):
    pytest.importorskip("transformers")
    from tests.interop.theirs import save_mllama

    save_mllama(tmp_path / "m")
    project, gates, text, _ = lines(tmp_path / "m")
    assert project == "mllama" and [*gates["attention"]] == [1, 4]
    assert "every name is understood" in text


@pytest.mark.parametrize("project", ["open_flamingo", "flamingo_pytorch"])
@pytest.mark.parametrize("part", ["xattn", "resampler"])
def test_other_projects_are_known_by_their_names(tmp_path, project, part):
    peer = Peer.load(f"{project}-{part}-small")
    folder = made.save_folder(tmp_path / "m", peer.config, peer.weights)
    found, gates, text, _ = lines(folder)
    assert found == project and "every name is understood" in text
    for kind, gate in (("attention", "attn_gate"), ("dense", "ff_gate")) * (part == "xattn"):
        (alpha,) = (x for name, x in peer.weights.items() if name.endswith(gate))
        assert gates[kind][0] == pytest.approx(abs(np.tanh(alpha)))


def test_the_figure_replaces_only_its_own(tmp_path, capsys):
    plot = tmp_path / "gates.png"
    ask = ["inspect", str(WEIGHTS / "flamingo"), "--plot", str(plot)]
    assert main(ask) == main(ask) == 0
    assert f"figure: {plot}" in capsys.readouterr().out
    with Image.open(plot) as image:
        assert image.info["made_by"] == inspection.COMMAND and image.width > 800
    mine = io.BytesIO()
    Image.new("RGB", (9, 9)).save(mine, "PNG")
    plot.write_bytes(mine.getvalue())
    assert main(ask) == 2 and plot.read_bytes() == mine.getvalue()
    assert f"--plot: {plot}: in the way" in capsys.readouterr().err


def test_errors_are_one_line(tmp_path, capsys):
    folder = made.save_folder(tmp_path / "m", made.LLAMA, made.llama_state())
    for words in (
        [str(tmp_path / "none")],
        [str(folder), "--plot", str(tmp_path / "gates.png")],  # a Llama has none
        [str(folder), "--plot", str(tmp_path / "gates.txt")],
    ):
        assert main(["inspect", *words]) == 2
        said = capsys.readouterr().err
        assert said.startswith("miniflamingo: error: ") and said.count("\n") == 1
