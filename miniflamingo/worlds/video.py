"""Videos from disk, the paper's VTP: clips -> prompts [frames, caption] for `prompt.build_batch`.

    x.jsonl     {"video": "clips/1.mp4", "caption": "a dog runs"}     ("text" is read too)
    x.tar       0001.mp4  0001.txt  0002.gif  0002.json

Frames are taken at 1 a second, 8 of them, as in the paper's training; they are PIL images. A longer
clip is entered at a random whole second, a choice; a shorter one gives fewer frames, and so does a
file that was cut off but can be read up to there. Animated GIFs and WebPs are read by Pillow, with
the time that each of their frames is shown; everything else by PyAV, an optional extra:
pip install "miniflamingo[video]".
"""

from bisect import bisect_right
from fractions import Fraction
from functools import partial
from itertools import accumulate
from math import floor
from pathlib import Path

from PIL import Image, ImageSequence

from miniflamingo.worlds.disk import Dataset
from miniflamingo.worlds.records import BadRecord, check_text, open_image, to_rgb

ANIMATIONS = ("gif", "webp")
VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "mov", "avi", "m4v", "mpg", "mpeg", *ANIMATIONS)
# not playlists: they name other files and addresses, which would be read
PYAV_OPTIONS = {
    "format_whitelist": "mov,mp4,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg",
    "protocol_whitelist": "file",
}
NO_DURATION = 100  # milliseconds for a frame that gives none, as browsers do


def read_videos(source, root=None, tokenizer=None, fps=1, max_frames=8, strict=False):
    """A Dataset of prompts [[frame, ...], caption], 1 to max_frames frames, `fps` a second.

    source, root and tokenizer as in disk.read_pairs. ValueError for no such file, for fps <= 0 or
    max_frames < 1, and, when the first clip that needs it is met, for PyAV not being installed.
    """
    if not fps > 0 or max_frames < 1:
        raise ValueError(f"expected fps > 0 and max_frames >= 1, got {fps} and {max_frames}")
    decode = partial(_clip, tokenizer=tokenizer, fps=Fraction(fps), max_frames=max_frames)
    return Dataset(source, decode, root, strict)


def _clip(record, rng, report, tokenizer, fps, max_frames):
    caption = check_text(record.text(), tokenizer)
    draw = partial(draw_times, fps=fps, count=max_frames, rng=rng)
    return [_read(*record.media("video", VIDEO_SUFFIXES), draw), caption]


def _read(name, source, draw):
    read = _read_animation if name.lower().endswith(ANIMATIONS) else _read_video
    return read(name, source, draw)


def read_clip(path, num_frames=8):
    """One file -> num_frames PIL images, spread evenly over its whole length.

    What read_videos samples once a second, for a clip of any length. ValueError (a BadRecord) for a
    file without frames or that cannot be read, and for PyAV not being installed where it is needed.
    """
    return _read(str(path), Path(path), partial(spread_times, count=num_frames))


def spread_times(duration, count):
    """`count` times, evenly spread over a clip; a second apart if its duration is None."""
    return [Fraction(k * (count if duration is None else duration)) / count for k in range(count)]


def draw_times(duration, fps, count, rng):
    """When to look at a clip: up to `count` times, 1/fps seconds apart, all below its duration.

    A duration of None, not known, begins at 0.
    """
    duration = count / fps if duration is None else duration
    spare = floor(duration - count / fps)
    start = int(rng.integers(spare + 1)) if spare > 0 else 0
    return [start + k / fps for k in range(count) if start + k / fps < duration] or [Fraction(0)]


def _read_animation(name, source, draw):
    """A GIF or WebP -> the frames that are shown at the drawn times."""
    with open_image(name, source) as image:
        shown = [_milliseconds(frame) for frame in ImageSequence.Iterator(image)]
        begins = [0, *accumulate(shown)]
        frames = []
        for time in draw(Fraction(begins[-1], 1000)):
            image.seek(bisect_right(begins, time * 1000) - 1)
            frames.append(to_rgb(image))
        return frames


def _milliseconds(frame):
    frame.load()  # a WebP knows only then
    return round(frame.info.get("duration", 0)) or NO_DURATION


def _read_video(name, source, draw):
    """Any other file -> the frames that are shown at the drawn times, by PyAV."""
    try:
        import av
    except ImportError:
        extra = 'pip install "miniflamingo[video]"'
        raise ValueError(f"reading {name} needs PyAV, an optional extra: {extra}") from None
    source = str(source) if isinstance(source, Path) else source
    try:
        with av.open(source, options=PYAV_OPTIONS) as container:
            if not container.streams.video:
                raise BadRecord("no frames", f"{name} has no video stream")
            frames = _frames_at(container, draw(_duration(container)))
            if not frames:
                raise BadRecord("no frames", f"not one frame in {name}")
            # a camera held upright notes the turn: degrees, counter-clockwise
            return [frame.to_image().rotate(frame.rotation, expand=True) for frame in frames]
    except BadRecord:
        raise
    except Exception as error:  # as Pillow: on damaged bytes almost anything
        message = f"{name}: {type(error).__name__}: {error}"
        raise BadRecord("unreadable video", message) from None


def _duration(container):
    """In seconds, by the file's own account; None without one."""
    stream = container.streams.video[0]
    if stream.duration:
        return stream.duration * stream.time_base
    return Fraction(container.duration, 1_000_000) if container.duration else None


def _frames_at(container, times):
    """The frame last shown at each time; times past the clip's true end have none."""
    at, end = {}, 0
    for begin, until, frame in _timed_frames(container):
        if begin > times[-1]:
            break
        at.update({time: frame for time in times if time >= begin})
        end = until
    return [at[time] for time in times if time < end] or [*at.values()][:1]


def _timed_frames(container):
    """Yield (begin, end, frame) in seconds after the first frame, in the order of showing."""
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise BadRecord("unreadable video", "there is no decoder for its video stream")
    largest, size = Image.MAX_IMAGE_PIXELS, stream.codec_context.width * stream.codec_context.height
    if largest is not None and size > largest:
        raise BadRecord("image too large", f"frames of {size} pixels, more than {largest}")
    step, first, end = 1 / (stream.average_rate or Fraction(25)), None, Fraction(0)
    for frame in container.decode(stream):
        begin = end if frame.pts is None else frame.pts * frame.time_base
        first = begin if first is None else first
        begin -= first if frame.pts is not None else 0
        end = begin + step
        yield begin, end, frame
