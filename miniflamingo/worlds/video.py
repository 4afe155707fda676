"""Videos from disk, the paper's VTP: clips -> prompts [frames, caption] for `prompt.build_batch`.

    x.jsonl     {"video": "clips/1.mp4", "caption": "a dog runs"}     ("text" is read too)
    x.tar       0001.mp4  0001.txt  0002.gif  0002.json

Frames are taken at 1 a second, 8 of them, as in the paper's training; they are PIL images. A longer
clip is entered at a random whole second, a choice; a shorter one gives fewer frames. A frame is on
show until the next begins, and the clip lasts from the first frame to the end of the last, whatever
its sound or its container say. Of a file that was cut off or damaged, the frames that can be read
are used, and `report.remarks` counts it. Animations (GIF, WebP, APNG) are read by Pillow, with the
time that browsers show each of their frames; everything else by PyAV, an optional extra:
pip install "miniflamingo[video]".
"""

import warnings
from contextlib import suppress
from fractions import Fraction
from functools import partial
from itertools import pairwise
from math import floor
from pathlib import Path

from PIL import Image

from miniflamingo.pictures import (
    BadRecord,
    check_file,
    check_size,
    iterate_frames,
    keep,
    open_picture,
    to_rgb,
)
from miniflamingo.worlds.disk import Dataset
from miniflamingo.worlds.records import check_text

ANIMATIONS = ("gif", "webp", "png", "apng")
VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "mov", "avi", "m4v", "mpg", "mpeg", *ANIMATIONS)
# not playlists: they name other files and addresses, which would be read
PYAV_OPTIONS = {
    "format_whitelist": "mov,mp4,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg",
    "protocol_whitelist": "file",
}
COVER = 0x400  # the disposition of a picture that is attached to a film
NO_RATE = Fraction(1, 25)  # a choice, for a file of one frame that gives none


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

    def say(text):
        report.remark(record.where, BadRecord("clip cut off", text))

    return [_read(*record.media("video", VIDEO_SUFFIXES), draw, say), caption]


def read_clip(path, num_frames=8):
    """One file -> num_frames PIL images, spread evenly over its whole length.

    What read_videos samples once a second, for a clip of any length. A clip that is cut off gives
    its first frames, and a warning. ValueError (a BadRecord) for a file without frames
    or that cannot be read, and for PyAV not being installed where it is needed.
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


def _read(name, source, draw, say=None):
    """A Path or BytesIO -> RGB images, those on show at the times that draw(duration) gives."""
    if isinstance(source, Path):
        check_file(source, "video")
    read = _read_animation if _is_animation(name, source) else _read_video
    frames, faults = read(name, source, draw)
    if faults:
        (say or partial(warnings.warn, stacklevel=3))(f"{name}: {'; '.join(faults)}")
    return frames


def _is_animation(name, source):
    """By what the file holds; by its name, where that is neither."""
    head = b"" if isinstance(source, Path) else source.getvalue()[:12]
    with suppress(OSError):
        if isinstance(source, Path):
            with source.open("rb") as file:
                head = file.read(12)
    known = head[:4] in (b"GIF8", b"\x89PNG") or head[8:] == b"WEBP"
    return known or (head[4:8] != b"ftyp" and name.lower().endswith(ANIMATIONS))


def _frames_at(timed, times, to_picture):
    """(begin, end, frame) in the order of showing -> the pictures on show at some times.

    Times behind the last frame's end have none, but there is always one picture.
    """
    shown, frame = [], None
    for begin, end, frame in timed:
        due = sum(begin <= time < end for time in times)
        picture = to_picture(frame) if due else None
        for _ in range(due):
            keep(shown, picture)
        if times[-1] < end:
            break
    return shown if shown or frame is None else [to_picture(frame)]


# --- animations, by Pillow ----------------------------------------------------------------------


def _read_animation(name, source, draw):
    """-> the pictures on show at the drawn times, and what is wrong with the file."""
    faults = []
    with open_picture(source, name) as image:
        begins = [0]
        for _, milliseconds in iterate_frames(image, faults.append):
            begins.append(begins[-1] + milliseconds)
        seconds = [Fraction(begin, 1000) for begin in begins]
        frames = (frame for frame, _ in iterate_frames(image, lambda fault: None))
        timed = zip(seconds, seconds[1:], frames)
        return _frames_at(timed, draw(seconds[-1]), to_rgb), faults


# --- videos, by PyAV ----------------------------------------------------------------------------


def _read_video(name, source, draw):
    """-> the pictures on show at the drawn times, and what is wrong with the file."""
    try:
        import av
    except ImportError:
        extra = 'pip install "miniflamingo[video]"'
        raise ValueError(f"reading {name} needs PyAV, an optional extra: {extra}") from None
    try:
        with _open_video(av, source) as container:
            duration, step, faults = _measure(container)
        with _open_video(av, source) as container:
            timed = _timed_frames(container, duration, step, faults)
            frames = _frames_at(timed, draw(duration), _to_picture)
        if not frames:
            raise BadRecord("no frames", "; ".join(["not one frame", *faults]))
        return frames, faults
    except BadRecord as error:
        raise BadRecord(error.reason, f"{name}: {error}") from None
    except Exception as error:  # as Pillow: on damaged bytes almost anything
        message = f"{name}: {type(error).__name__}: {error}"
        raise BadRecord("unreadable video", message) from None


def _open_video(av, source):
    if not isinstance(source, Path):
        source.seek(0)
    return av.open(str(source) if isinstance(source, Path) else source, options=PYAV_OPTIONS)


def _stream(container):
    """The first video stream that is not the file's cover, within the limit of pixels."""
    streams = [s for s in container.streams.video if not getattr(s, "disposition", 0) & COVER]
    if not streams:
        raise BadRecord("no frames", "there is no video stream")
    context = streams[0].codec_context
    if context is None:
        raise BadRecord("unreadable video", "there is no decoder for its video stream")
    if context.width:
        check_size((context.width, context.height), what="frame")
    return streams[0]


def _measure(container):
    """The picture's length and its shortest frame in seconds, by its packets' times; faults.

    A frame lasts until the next begins; only of the last one, its own duration counts.
    """
    stream, spans, latest, faults = _stream(container), [], Fraction(0), []
    for packet in _packets(container, faults):
        time = packet.dts if packet.pts is None else packet.pts
        if time is None or packet.is_corrupt or packet.is_discard:  # the latter by an edit list
            continue
        begin = time * packet.time_base
        span = begin, begin + (packet.duration or 0) * packet.time_base
        latest = max(latest, *span)
        if packet.stream.index == stream.index:
            spans.append(span)
    if not spans:
        return None, NO_RATE, faults
    spans.sort()
    step = min((b - a for (a, _), (b, _) in pairwise(spans) if b > a), default=NO_RATE)
    (first, _), (begin, end) = spans[0], spans[-1]
    duration = (end if end > begin else begin + step) - first
    missing = _promised(container, stream, latest - duration) - duration
    if missing > max(step, NO_RATE) * 9 / 10:
        says = f"cut off after {float(duration):.2f} s, {float(missing):.2f} s are missing"
        faults.insert(0, says)
    return duration, step, faults


def _packets(container, faults, *streams):
    """Yield a file's packets up to where it is damaged."""
    try:
        yield from container.demux(*streams)
    except Exception as error:
        faults.append(f"damaged: {error}")


def _promised(container, stream, outside):
    """How long the picture is by the file's own account; `outside`: its clock before the picture
    begins and after it ends, a sound's."""
    if stream.duration:
        return stream.duration * stream.time_base
    if container.duration and container.format.name.startswith("matroska"):
        return Fraction(container.duration, 1_000_000) - outside
    return 0


def _timed_frames(container, duration, step, faults):
    """Yield (begin, end, frame) in seconds after the first frame, in the order of showing."""
    lost, now, begin, first = [], None, Fraction(0), None
    for frame in _decode(container, lost):
        time = frame.dts if frame.pts is None else frame.pts
        clock = begin + step if time is None else time * frame.time_base
        first = clock if first is None else first
        after = max(begin, clock - (0 if time is None else first))
        if now is not None:
            yield begin, after, now
        begin, now = after, frame
    if lost:
        faults.append(f"{len(lost)} packets cannot be decoded: {lost[0]}")
    if now is not None:  # what was lost may have been all of the rest
        end = begin + step
        yield begin, end if lost or duration is None else max(end, duration), now


def _decode(container, lost):
    """Yield the frames; errors go to `lost`, as players go on behind them."""
    for packet in _packets(container, lost, _stream(container)):  # the last is empty: it flushes
        try:
            frames = packet.decode() if not packet.is_corrupt else lost.append("damaged")
        except (ValueError, OSError, EOFError) as error:  # PyAV's are of these kinds
            frames = lost.append(error)
        yield from frames or ()


def _to_picture(frame):
    check_size((frame.width, frame.height), what="frame")
    seen_through = frame.format.has_palette or any(c.is_alpha for c in frame.format.components)
    image = frame.to_image()
    if seen_through:
        image = to_rgb(Image.fromarray(frame.to_ndarray(format="rgba")))
    # a camera held upright notes the turn: degrees, counter-clockwise
    return image.rotate(frame.rotation, expand=True)
