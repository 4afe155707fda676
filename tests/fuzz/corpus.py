"""Whole files of every kind that the project reads: what the attack then damages.

pictures/, clips/, model/; user/, a folder of somebody's own files; runs/, three finished trainings;
run/, one that was killed; sharded/, one of `train-torch`; foreign/, other projects' checkpoints.
"""

import io
import os
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from miniflamingo import training
from tests.fuzz import small
from tests.interop import made

SIDE = 40


def build(folder):
    """Write all of it; returns 0, as a case's act does."""
    os.chdir(folder)
    for name in ("pictures", "clips", "model", "user/out/live", "user/weights/flamingo"):
        Path(name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, content in pictures(rng):
        Path("pictures", name).write_bytes(content)
    for name, content in clips(rng):
        Path("clips", name).write_bytes(content)
    _models()
    _foreign()
    _user_files()
    _runs()
    return 0


def picture(rng):
    """A smooth RGB picture of a random colour."""
    ramp = np.linspace(0.3, 1, SIDE)[:, None, None] * rng.integers(40, 255, 3)
    return Image.fromarray(np.broadcast_to(ramp, (SIDE, SIDE, 3)).astype(np.uint8))


def encoded(image, kind, **options):
    """An image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pictures(rng):
    """Yield (name, bytes). Those named "no_..." are whole, and to be refused all the same."""
    from PIL import ImageCms

    rgb, turned, two = picture(rng), Image.Exif(), [picture(rng), picture(rng)]
    turned[274] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = np.linspace(0, 65535, SIDE**2).reshape(SIDE, SIDE)
    palette, deep = rgb.convert("P"), Image.fromarray(grey.astype(np.uint16))
    yield "rgb.png", encoded(rgb, "PNG", exif=turned)
    yield "rgba.png", encoded(rgb.convert("RGBA"), "PNG")
    yield "la.png", encoded(rgb.convert("LA"), "PNG")
    yield "palette.png", encoded(palette, "PNG", transparency=0)
    yield "grey16.png", encoded(deep, "PNG")
    yield "bits.png", encoded(rgb.convert("1"), "PNG")
    yield "exif.jpg", encoded(rgb, "JPEG", exif=turned, icc_profile=profile)
    yield "cmyk.jpg", encoded(rgb.convert("CMYK"), "JPEG")
    yield "progressive.jpg", encoded(rgb.convert("L"), "JPEG", progressive=True)
    yield "phone.jpg", encoded(rgb, "MPO", save_all=True, append_images=two)
    yield "still.gif", encoded(palette, "GIF", transparency=0)
    yield "lossless.webp", encoded(rgb.convert("RGBA"), "WEBP", lossless=True)
    yield "rgb.bmp", encoded(rgb, "BMP")
    yield "packed.tif", encoded(rgb, "TIFF", compression="tiff_lzw")
    yield "grey16.tif", encoded(deep, "TIFF")
    yield "no_float.tif", encoded(Image.fromarray(grey.astype(np.float32)), "TIFF")


def clips(rng):
    """Yield (name, bytes) of short clips."""
    frames = [picture(rng) for _ in range(6)]
    more = dict(save_all=True, append_images=frames[1:], duration=[20, 0, 100, 500, 70, 70])
    yield "clip.gif", encoded(frames[0], "GIF", **more)
    yield "clip.webp", encoded(frames[0], "WEBP", **more)
    try:
        import av  # noqa: F401
    except ImportError:
        return
    for name, container, codec, sound in (
        ("clip.mp4", "mp4", "libx264", 0), ("sound.mkv", "matroska", "libx264", 2),
        ("clip.webm", "webm", "libvpx", 0), ("clip.avi", "avi", "mpeg4", 0),
    ):  # fmt: skip
        yield name, film(frames, container, codec, sound)


def film(frames, container, codec, sound=0):
    """A video of frames shown for unequal times, with some seconds of silence beside it."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", container) as movie:
        stream = movie.add_stream(codec, rate=10)
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 10)
        audio = movie.add_stream("libopus", rate=48000) if sound else None
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = 2 * i + 5 * (i > 3), Fraction(1, 10)
            movie.mux(stream.encode(frame))
        movie.mux(stream.encode())
        for i in range(sound * 50):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.int16), "s16", "stereo")
            frame.sample_rate, frame.pts = 48000, i * 960
            movie.mux(audio.encode(frame))
        if audio:
            movie.mux(audio.encode())
    return file.getvalue()


def _models():
    lm = training.LanguageStage(small.SmallLanguageRun())
    vision = training.VisionStage(small.SmallVisionRun())
    for name, stage in (("lm", lm), ("vision", vision)):
        Path("model", name).mkdir()
        stage.save(Path("model", name, "model.safetensors"))
    bridge = training.BridgeStage(small.SmallBridgeRun(), "model/lm", "model/vision")
    bridge.save(Path("model/model.safetensors"))


def _foreign():
    """A Llama in shards with a tokenizer, and as a GGUF, and an OpenFlamingo with a picture, where
    the packages are here."""
    tokenizer = made.trained() if find_spec("tokenizers") else None
    folder = made.save_folder(Path("foreign/llama"), made.LLAMA, made.llama_state(), 2)
    if tokenizer is not None:
        made.save_tokenizer(folder, tokenizer)
        flamingo = Path("foreign/flamingo")
        made.save_folder(flamingo, made.OPEN_FLAMINGO, made.open_flamingo_state())
        eyed = made.trained()
        eyed.add_special_tokens(["<|endofchunk|>", "<image>"])
        made.save_tokenizer(flamingo, eyed)
        about = '{"size": {"shortest_edge": 28}, "crop_size": 28}'
        (flamingo / "preprocessor_config.json").write_text(about, "utf-8")
        picture(np.random.default_rng(2)).save(flamingo / "a.png")
    if tokenizer is not None and find_spec("gguf"):
        metadata, tensors = made.gguf_llama(kind="Q8_0")
        made.save_gguf(Path("foreign/llama.gguf"), metadata | made.tables(tokenizer), tensors)


def _user_files():
    os.chdir("user")
    rng = np.random.default_rng(1)
    for name in ("notes.txt", "metrics.json", "out/live/mine.txt", "out/metrics.json",
                 "out/index.html", "weights/flamingo/card.md"):  # fmt: skip
        Path(name).write_text("my own notes\n", "utf-8")
    picture(rng).save("picture.png")
    picture(rng).save("clip.gif", save_all=True, append_images=[picture(rng)], duration=500)
    os.chdir("..")


def _runs():
    """Three finished runs, and one of six steps that was killed in its fifth."""
    frozen = ["--lm", "runs/lm", "--vision", "runs/vision"]
    for stage, more in (("lm", []), ("vision", []), ("flamingo", frozen)):
        train("train", stage, "--out", f"runs/{stage}", "--steps", "2", *more)
    metrics = training.WEIGHTS / "flamingo" / "metrics.json"
    Path("runs/flamingo/metrics.json").write_bytes(metrics.read_bytes())
    step, pid = training.Run.step, os.fork()
    if pid == 0:
        training.Run.step = lambda run: os._exit(0) if run.optimiser.step == 4 else step(run)
        train("train", "lm", *RUN)
    os.waitpid(pid, 0)
    assert len(Path("run/log.jsonl").read_text("utf-8").splitlines()) == 4
    train("train-torch", "lm", *RUN[:1], "sharded", *RUN[2:], "--checkpoint-every", "4")
    Path("sharded/model.safetensors").unlink()


RUN = ["--out", "run", "--steps", "6", "--checkpoint-every", "3"]


def train(command, stage, *words):
    """A training command with the small defaults; AssertionError unless it ends well."""
    try:
        small.run("miniflamingo", [command, stage, *words])
    except SystemExit as stop:
        assert not stop.code, (command, stage, words, stop.code)
