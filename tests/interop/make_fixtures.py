"""Write tests/interop/fixtures/: what other projects' own code computes, for machines without it.

python -m tests.interop.make_fixtures    # needs flamingo-pytorch and open-flamingo
"""

from tests.interop.agreement import FIXTURES
from tests.interop.peers import PEERS


def main():
    """Make all of them again, and say how large they are."""
    FIXTURES.mkdir(exist_ok=True)
    for make in PEERS.values():
        for name, peer in make().items():
            peer.save(name)
    files = sorted(FIXTURES.glob("*.safetensors"))
    print(f"{len(files)} files, {sum(f.stat().st_size for f in files) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
