"""A notebook that is opened alone says what to install; on Colab it installs what was uploaded."""


def installed():
    """Where miniflamingo is missing: install it, on Colab, or say in an error what to do."""
    import glob
    import importlib.util as found
    import subprocess
    import sys

    wheels = sorted(glob.glob("miniflamingo-*.whl"))
    if found.find_spec("miniflamingo"):
        return
    if "google.colab" in sys.modules and wheels:
        command = [sys.executable, "-m", "pip", "install", "-q", wheels[-1]]
        if subprocess.run(command).returncode == 0:
            return
    raise ModuleNotFoundError(
        f"no miniflamingo for {sys.executable}: in the repository's folder, run\n"
        "    python -m pip install -e '.[course]'\n"
        "or make a file of it with `python -m pip wheel --no-deps .`, upload miniflamingo-*.whl "
        "to Colab, and run this cell again"
    )


installed()
