"""The pages for people: what they say is tried wherever it stands."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = {
    name: ROOT / name
    for name in (
        "README.md",
        "kernels/README.md",
        "kernels/model/README.md",
        "miniflamingo/INSTALL.md",
        "miniflamingo/README.md",
        "miniflamingo/ablations/README.md",
        "miniflamingo/fewshot/README.md",
        "miniflamingo/interop/README.md",
        "miniflamingo/real/README.md",
        "notebooks/README.md",
        "tests/README.md",
    )
}


def text_of(name):
    """What a page says."""
    return PAGES[name].read_text(encoding="utf-8")
