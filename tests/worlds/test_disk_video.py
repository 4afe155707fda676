"""Clips from disk: which frames are taken, what is skipped and counted, and PyAV being optional."""

import io
import json
import struct
import sys
import tarfile
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from miniflamingo.prompt import WordTokenizer, build_batch
from miniflamingo.worlds.disk import Stream
from miniflamingo.worlds.video import draw_times, read_clip, read_videos, spread_times

TOKENIZER = WordTokenizer(["a", "cat"])


def gif(durations, kind="GIF"):
    """Frame i is grey, of level 10 * i, and is shown for durations[i] milliseconds."""
    frames = [Image.new("L", (4, 4), 10 * i) for i in range(len(durations))]
    frames = [frame.convert("RGB") for frame in frames] if kind == "WEBP" else frames
    file, more = io.BytesIO(), {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(
        file, kind, save_all=True, append_images=frames[1:], duration=list(durations), **more
    )
    return file.getvalue()


def mp4(times, rate, kind="mp4"):
    """Frame i is grey, of level 10 * i, and begins at times[i] / rate seconds."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.bit_rate = 10_000_000
        for i, time in enumerate(times):
            pixels = np.full((16, 32, 3), 10 * i, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def sound():
    """An mp4 without any picture."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def read(folder, *clips, strict=False, **options):
    """clips: (file name, bytes), each with the caption "a cat"."""
    for name, content in clips:
        (folder / name).write_bytes(content)
    lines = (json.dumps({"video": name, "caption": "a cat"}) + "\n" for name, _ in clips)
    (folder / "clips.jsonl").write_text("".join(lines), "utf-8")
    return read_videos(folder, strict=strict, **options)


def levels(prompt):
    """Which frames they are: the colours are kept to +-4 by the codec."""
    means = [np.asarray(frame, float).mean() / 10 for frame in prompt[0]]
    assert np.allclose(means, np.round(means), atol=0.4)
    return np.round(means).astype(int).tolist()


# --- which frames -------------------------------------------------------------------------------


def test_a_gif_is_sampled_by_how_long_its_frames_are_shown(tmp_path):
    # 0 at 0 s, 2 at 1 s and at 2 s, 3 from 2.4 s to 3.0 s: no frame begins at a whole second
    (prompt,) = read(tmp_path, ("x.gif", gif([300, 300, 1800, 600])), tokenizer=TOKENIZER)
    assert levels(prompt) == [0, 2, 2]
    assert prompt[1] == "a cat"
    batch = build_batch([prompt], TOKENIZER, image_size=2)
    assert batch.pixels.shape == (1, 1, 3, 2, 2, 3)
    assert batch.num_frames.tolist() == [[3]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_animations_of_pillow(kind, tmp_path):
    (prompt,) = read(tmp_path, (f"x.{kind}", gif([700] * 5, kind)))  # from 0, 0.7, 1.4, 2.1, 2.8
    assert levels(prompt) == [0, 1, 2, 4]


def test_frames_without_a_duration_last_a_tenth_of_a_second(tmp_path):
    (prompt,) = read(tmp_path, ("x.gif", gif([0] * 25)))
    assert levels(prompt) == [0, 10, 20]


def test_a_still_gif_is_a_clip_of_one_frame(tmp_path):
    (prompt,) = read(tmp_path, ("x.gif", gif([500])))
    assert levels(prompt) == [0]


@given(st.lists(st.integers(2, 150), min_size=1, max_size=12), st.sampled_from([1, 2, 0.5]))
@settings(max_examples=40, deadline=None)
def test_a_gif_of_any_durations_shows_what_a_viewer_sees(tmp_path_factory, hundredths, fps):
    clip = ("x.gif", gif([10 * d for d in hundredths]))
    (prompt,) = read(tmp_path_factory.mktemp("gif"), clip, fps=fps, max_frames=100)
    seen = np.repeat(np.arange(len(hundredths)), hundredths)  # every hundredth of a second
    assert levels(prompt) == seen[:: int(100 / fps)].tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 4, 8, 12]),
        ({"fps": 2}, [0, 2, 4, 6, 8, 10, 12]),
        ({"fps": 0.5}, [0, 8]),
        ({"fps": 4, "max_frames": 99}, [*range(14)]),
        ({"fps": 8, "max_frames": 28}, np.repeat(range(14), 2).tolist()),
    ],
)
def test_a_video_is_sampled_at_fps(options, expected, tmp_path):
    (prompt,) = read(tmp_path, ("x.mp4", mp4(range(14), 4)), **options)  # 3.5 s
    assert levels(prompt) == expected
    assert prompt[0][0].size == (32, 16)


def test_the_pictures_of_a_video_with_gaps_are_shown_until_the_next_begins(tmp_path):
    # frames begin at 0, 0.1, 2.5 and 3.1 s
    (prompt,) = read(tmp_path, ("x.mp4", mp4([0, 1, 25, 31], 10)))
    assert levels(prompt) == [0, 1, 1, 2]


def test_other_containers_are_read_too(tmp_path):
    for kind in ("matroska", "avi", "MOV", "mpegts"):
        (prompt,) = read(tmp_path, (f"x.{kind}", mp4(range(10), 4, kind.lower())))
        assert levels(prompt) == [0, 4, 8]


@pytest.mark.parametrize("kind", ["mp4", "mpegts", "matroska"])
def test_a_clock_that_does_not_begin_at_0_is_set_to_it(kind, tmp_path):
    (prompt,) = read(tmp_path, (f"x.{kind}", mp4(range(8, 18), 4, kind)))  # from 2 s to 4.5 s
    assert levels(prompt) == [0, 4, 8]


def clip(kind, times, codec="libx264", sound=0, size=64, pixels="yuv420p", **options):
    """Frame i is grey, of level 8 * i, begins at times[i] / 10 seconds; seconds of silence."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10, options={"crf": "5", **options})
        stream.width = stream.height = size
        stream.pix_fmt, stream.codec_context.time_base = pixels, Fraction(1, 10)
        silence = container.add_stream("libopus", rate=48000) if sound else None
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), 8 * i, np.uint8), "rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for i in range(int(sound * 50)):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.int16), "s16", "stereo")
            frame.sample_rate, frame.pts = 48000, 960 * i
            container.mux(silence.encode(frame))
        container.mux(silence.encode() if sound else [])
    return file.getvalue()


def shown(frames):
    return [round(np.asarray(frame, float).mean() / 8) for frame in frames]


KINDS = [("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx-vp9"), ("mov", "libx264"),
         ("mpegts", "libx264"), ("flv", "libx264")]  # fmt: skip


@pytest.mark.filterwarnings("error:.*cut off")  # nothing is missing
@pytest.mark.parametrize("kind, codec", KINDS)
@pytest.mark.parametrize("first, sound", [(0, 0), (100, 0), (0, 12), (30, 12)])
def test_a_clip_is_as_long_as_its_picture(kind, codec, first, sound, tmp_path):
    sound = sound if kind in ("mp4", "matroska", "webm") else 0
    (tmp_path / "x").write_bytes(clip(kind, range(first, first + 24), codec, sound))
    assert shown(read_clip(tmp_path / "x", 8)) == [0, 3, 6, 9, 12, 15, 18, 21]


@pytest.mark.filterwarnings("error:.*cut off")
@pytest.mark.parametrize("kind", ["mp4", "matroska", "mov", "mpegts"])
@pytest.mark.parametrize("bf", ["0", "3"])
def test_a_picture_is_on_show_until_the_next_begins(kind, bf, tmp_path):
    (tmp_path / "x").write_bytes(clip(kind, [0, 5, 10, 79], bf=bf))  # to 8.0 s
    assert shown(read_clip(tmp_path / "x", 8)) == [0, 2, 2, 2, 2, 2, 2, 2]
    assert shown(read_clip(tmp_path / "x", 16)) == [0, 1, *[2] * 14]


def test_pictures_stored_in_another_order_and_without_times(tmp_path):
    (tmp_path / "x").write_bytes(clip("avi", range(24), "libx264", bf="2"))  # AVI has no pts
    got = shown(read_clip(tmp_path / "x", 8))
    assert len(got) == 8 and got == sorted(got) and got[0] == 0 and got[-1] >= 20


def test_a_file_that_does_not_say_how_long_it_is(tmp_path):
    content = bytearray(clip("webm", range(24), "libvpx-vp9"))
    at = content.index(b"\x44\x89\x88")  # Duration, 8 bytes
    content[at : at + 11] = b"\xec\x89" + bytes(9)  # void, as in what a browser records
    (tmp_path / "x").write_bytes(bytes(content))
    assert shown(read_clip(tmp_path / "x", 8)) == [0, 3, 6, 9, 12, 15, 18, 21]


def test_what_is_transparent_in_a_clip_is_white(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "x.mov"), "w") as container:
        stream = container.add_stream("qtrle", rate=2)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "argb"
        hidden = np.zeros((16, 16, 4), np.uint8)
        hidden[..., 0], hidden[8:, :, 3] = 255, 255  # red, seen below
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(hidden, "rgba")))
        container.mux(stream.encode())
    frame = np.asarray(read_clip(tmp_path / "x.mov", 2)[1])
    assert (frame[2, 2].tolist(), frame[-2, 2].tolist()) == ([255] * 3, [255, 0, 0])


@pytest.mark.parametrize("kind, codec", KINDS[:3])
def test_a_clip_that_is_cut_off_gives_its_first_frames_and_says_so(kind, codec, tmp_path):
    content = clip(kind, range(30), codec, sound=3, size=256)
    if kind == "mp4":
        content = with_its_index_in_front(content, tmp_path / "front.mp4")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.write_bytes(content)
    cut.write_bytes(content[: int(0.7 * len(content))])
    with pytest.warns(UserWarning, match=r"cut: cut off after \d\.\d+ s"):
        got = shown(read_clip(cut, 8))
    assert len(got) == 8 and got[0] == 0 and got == sorted(got) and 0 < got[-1] < 26
    data = read(tmp_path, ("cut", cut.read_bytes()), ("whole", content))
    assert len(list(data)) == 2
    assert (data.report.skipped, data.report.remarks) == ({}, {"clip cut off": 1})
    assert "1 remarks: 1 clip cut off" in str(data.report)
    with pytest.raises(ValueError, match="cut off after"):
        list(read(tmp_path, ("cut", cut.read_bytes()), strict=True))


def with_its_index_in_front(content, path):
    av = pytest.importorskip("av")
    options = {"movflags": "faststart"}
    with av.open(io.BytesIO(content)) as given, av.open(str(path), "w", options=options) as written:
        streams = [written.add_stream_from_template(stream) for stream in given.streams]
        for packet in given.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                written.mux(packet)
    return path.read_bytes()


def test_an_animation_that_is_cut_off_is_counted_and_used(tmp_path):
    data = read(tmp_path, ("x.gif", gif([900] * 3)[:-40]))
    (prompt,) = data
    assert 1 <= len(prompt[0]) < 3
    assert data.report.remarks == {"clip cut off": 1}


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_frames_of_up_to_ten_milliseconds_last_a_hundred(kind, tmp_path):
    (tmp_path / "x").write_bytes(gif([10, 0, 20, 80], kind))  # 100, 100, 20, 80: by its content
    assert levels([read_clip(tmp_path / "x", 6)]) == [0, 0, 1, 1, 2, 3]


def test_frames_that_are_kept_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("miniflamingo.pictures.MAX_CLIP_PIXELS", 3 * 16)
    data = read(tmp_path, ("3.gif", gif([1000] * 3)), ("4.gif", gif([1000] * 4)))
    assert len(list(data)) == 1
    assert data.report.skipped == {"image too large": 1}


def test_a_file_that_ends_before_its_time_gives_the_frames_it_has(tmp_path):
    whole = mp4(range(14), 4, "matroska")  # says 3.5 s at its beginning
    (prompt,) = read(tmp_path, ("x.mkv", whole[: int(0.6 * len(whole))]))
    found = levels(prompt)
    assert 0 < len(found) < 4
    assert found == [0, 4, 8, 12][: len(found)]


@pytest.fixture(scope="module")
def videos():
    return {kind: mp4(range(6), 2, kind) for kind in ("mp4", "matroska", "avi")}


@given(st.sampled_from(["mp4", "matroska", "avi"]), st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_are_a_bad_record_or_a_clip_and_nothing_else(
    videos, tmp_path_factory, kind, data
):
    content = bytearray(videos[kind])
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    folder = tmp_path_factory.mktemp("video")
    dataset = read(folder, ("0.gif", gif([100])), ("x.video", bytes(content)))
    clips = list(dataset)
    assert len(clips) + dataset.report.skipped.total() == 2
    assert all(1 <= len(frames) <= 8 for frames, _ in clips)


@pytest.mark.parametrize("name", ["x.gif", "x.mp4"])
def test_a_long_clip_is_entered_at_a_random_second(name, tmp_path):
    content = gif([500] * 24) if name == "x.gif" else mp4(range(24), 2)  # 12 s
    stream = Stream(read(tmp_path, (name, content)))
    clips = [levels(next(stream)) for _ in range(30)]
    assert {clip[0] for clip in clips} == {0, 2, 4, 6, 8}
    assert all(clip == list(range(clip[0], clip[0] + 16, 2)) for clip in clips)
    resumed = Stream(read(tmp_path, (name, content)), state=(29, 0))
    assert levels(next(resumed)) == clips[29]


@given(
    st.fractions(0, 30, max_denominator=60), st.integers(1, 10), st.sampled_from([1, 3, 0.5]),
    st.integers(0, 9),
)  # fmt: skip
def test_times_lie_within_the_clip_and_as_many_as_fit(duration, count, fps, seed):
    times = draw_times(duration, Fraction(fps), count, np.random.default_rng(seed))
    assert 1 <= len(times) <= count
    assert all(b - a == 1 / Fraction(fps) for a, b in pairwise(times))
    assert times[0] == int(times[0]) >= 0
    assert times[-1] < duration or times == [0]
    assert len(times) == count or times[-1] + 1 / Fraction(fps) >= duration


def test_a_video_filmed_upright_is_turned_upright(tmp_path):
    unity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        pixels = np.zeros((16, 32, 3), np.uint8)
        pixels[:, :16] = 255  # white on the left
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    content = file.getvalue()
    at = content.rindex(unity)  # the track's; the movie's matrix stands before it
    (prompt,) = read(tmp_path, ("x.mp4", content[:at] + turned + content[at + 36 :]))
    frame = np.asarray(prompt[0][0])
    assert frame.shape == (32, 16, 3)
    assert frame[:14].min() > 200 > 50 > frame[18:].max()  # a quarter turn clockwise: white on top


def test_clips_in_shards(tmp_path):
    files = [("1.mp4", mp4(range(8), 4)), ("1.txt", b"a cat")]
    files += [("2.gif", gif([1000] * 3)), ("2.json", b'{"text": "a"}'), ("3.txt", b"a cat")]
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    data = read_videos(tmp_path)
    assert [(levels(prompt), prompt[1]) for prompt in data] == [([0, 4], "a cat"), ([0, 1, 2], "a")]
    assert data.report.skipped == {"missing video": 1}


# --- what is skipped ----------------------------------------------------------------------------

BAD_CLIPS = {
    "no mp4": (lambda: ("x.mp4", b"no video at all"), "unreadable video", "x.mp4: "),
    "empty": (lambda: ("x.mp4", b""), "unreadable video", "x.mp4: "),
    "cut": (lambda: ("x.mp4", mp4(range(14), 4)[:900]), "unreadable video", "x.mp4: "),
    "sound": (lambda: ("x.mp4", sound()), "no frames", "no video stream"),
    "no gif": (lambda: ("x.gif", b"GIF89a"), "unreadable image", "x.gif: "),
    "cut gif": (lambda: ("x.gif", gif([900])[:-9]), "unreadable image", "x.gif: "),
}


@pytest.mark.parametrize("name", BAD_CLIPS)
def test_a_bad_clip_is_counted_and_named_or_raised_when_strict(name, tmp_path):
    make, reason, says = BAD_CLIPS[name]
    pytest.importorskip("av")
    data = read(tmp_path, ("0.gif", gif([100])), make())
    assert len(list(data)) == 1
    assert data.report.skipped == {reason: 1}
    (message,) = data.report.messages
    assert message.startswith(f"{tmp_path}/clips.jsonl:2: ")
    assert says in message
    with pytest.raises(ValueError, match=r"clips\.jsonl:2: "):
        list(read(tmp_path, ("0.gif", gif([100])), make(), strict=True))


def test_a_video_without_a_single_frame_is_counted(tmp_path):
    empty = mp4([], 4)
    data = read(tmp_path, ("0.gif", gif([100])), ("x.mp4", empty))
    assert len(list(data)) == 1
    assert data.report.skipped.keys() <= {"no frames", "unreadable video"}
    assert data.report.skipped.total() == 1


@pytest.mark.parametrize("name", ["x.gif", "x.mp4"])
def test_frames_that_are_absurdly_large_are_counted(name, tmp_path, monkeypatch):
    content = gif([100] * 3) if name == "x.gif" else mp4(range(3), 4)
    data = read(tmp_path, (name, content))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    with pytest.raises(ValueError, match="1 read, 0 yielded, 1 skipped: 1 image too large"):
        list(data)


def test_a_playlist_cannot_lead_out_of_the_folder(tmp_path):
    av = pytest.importorskip("av")
    (tmp_path / "secret.ts").write_bytes(mp4(range(8), 4, "mpegts"))
    (tmp_path / "clips").mkdir()
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n../secret.ts\n#EXT-X-ENDLIST\n"
    data = read(tmp_path / "clips", ("0.gif", gif([100])), ("x.m3u8", playlist))
    with av.open(str(tmp_path / "clips" / "x.m3u8")) as container:  # as it stands, it does
        assert len(list(container.decode(video=0))) == 8
    assert len(list(data)) == 1
    assert data.report.skipped == {"unreadable video": 1}


def test_captions_and_names_are_checked_as_those_of_pairs(tmp_path):
    (tmp_path / "x.gif").write_bytes(gif([100]))
    lines = [
        {"video": "x.gif", "text": "a red cat"}, {"video": "../x.gif", "text": "a"},
        {"video": "y.gif", "text": "a"}, {"image": "x.gif", "text": "a"},
        {"video": "x.gif", "text": "a"},
    ]  # fmt: skip
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    data = read_videos(tmp_path, tokenizer=TOKENIZER)
    assert len(list(data)) == 1
    assert data.report.skipped == {
        "unknown words": 1, "path outside the folder": 1, "missing video": 1, "missing key": 1,
    }  # fmt: skip


def test_options_are_checked(tmp_path):
    for options in ({"fps": 0}, {"fps": float("nan")}, {"max_frames": 0}):
        with pytest.raises(ValueError, match="expected fps > 0 and max_frames >= 1, got"):
            read(tmp_path, ("x.gif", gif([100])), **options)


def test_without_pyav_a_video_says_what_to_install_and_gifs_still_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    assert len(list(read(tmp_path, ("x.gif", gif([100]))))) == 1
    with pytest.raises(
        ValueError, match=r'x\.mp4 needs PyAV.* pip install "miniflamingo\[video\]"'
    ):
        list(read(tmp_path, ("x.gif", gif([100])), ("x.mp4", b"")))


@pytest.mark.parametrize("frames, count, expected", [
    (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
    (3, 6, [0, 0, 1, 1, 2, 2]),
    (16, 4, [0, 4, 8, 12]),
])  # fmt: skip
def test_one_clip_is_spread_over_its_whole_length(frames, count, expected, tmp_path):
    (tmp_path / "a.gif").write_bytes(gif([50] * frames))
    assert levels([read_clip(tmp_path / "a.gif", count)]) == expected


def test_a_clip_without_a_known_length_is_looked_at_once_a_second():
    assert spread_times(None, 3) == [0, 1, 2]
    assert spread_times(Fraction(1, 2), 2) == [0, Fraction(1, 4)]
