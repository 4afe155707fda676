"""How bytes and JSON values are damaged at random."""

import json
import zlib

import numpy as np

NUMBERS = [0, 1, -1, 7, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**40, -(2**63), 2**63 - 1]
VALUES = [
    None, True, False, "", "x", "\ud83d", "\0", "../x", "/etc/passwd", "a" * 5000, [], {}, [[]],
    [1, 2], {"a": {"b": []}}, 0, 1, -1, 2, 3.0, 0.5, 10**9, 10**12, -(10**12), 10**40, 1e300, -0.0,
    float("nan"), float("inf"),
]  # fmt: skip


def pick(rng, things):
    """One of some things."""
    return things[int(rng.integers(len(things)))]


def damage(rng, data, other=b"", first=0):
    """Bytes with one to three wounds, none of them before the offset `first`."""
    head, body = data[:first], bytearray(data[first:])
    for _ in range(int(rng.integers(1, 4))):
        body = bytearray(pick(rng, WOUNDS)(rng, body, other))
    return head + bytes(body)


def _span(rng, data, most=2000):
    """A random piece, as often within the first 200 bytes, where headers are, as anywhere."""
    end = len(data) if rng.random() < 0.5 else min(len(data), 200)
    begin = int(rng.integers(0, end + 1))
    return begin, begin + int(rng.integers(0, min(most, len(data) - begin) + 1))


def _flip(rng, data, other):
    begin, end = _span(rng, data, 40)
    for i in rng.integers(begin, end, 3) if end > begin else []:
        data[i] ^= 1 << int(rng.integers(8))
    return data


def _number(rng, data, other):
    begin, _ = _span(rng, data)
    size, order = pick(rng, [1, 2, 4, 8]), pick(rng, ["big", "little"])
    value = (pick(rng, NUMBERS) % (1 << 8 * size)).to_bytes(size, order)
    data[begin : begin + size] = value
    return data


def _fill(rng, data, other):
    begin, end = _span(rng, data)
    data[begin:end] = bytes([pick(rng, [0, 255, 10, 32])]) * (end - begin)
    return data


def _noise(rng, data, other):
    begin, end = _span(rng, data, 200)
    data[begin:end] = rng.bytes(end - begin)
    return data


def _swap(rng, data, other):
    (a, b), (c, d) = sorted([_span(rng, data), _span(rng, data)])
    return data[:a] + data[c:d] + data[min(b, c) : c] + data[a : min(b, c)] + data[d:]


def _cut_out(rng, data, other):
    begin, end = _span(rng, data)
    return data[:begin] + data[end:]


def _repeat(rng, data, other):
    begin, end = _span(rng, data)
    return data[:end] + data[begin:]


WOUNDS = [
    _flip, _flip, _number, _number, _fill, _noise, _swap, _cut_out, _repeat,
    lambda rng, data, other: data[: int(rng.integers(len(data) + 1))],  # the end is missing
    lambda rng, data, other: data + other,
    lambda rng, data, other: data[: _span(rng, data)[0]] + other[_span(rng, other)[0] :],
]  # fmt: skip


def damage_png(rng, data):
    """A PNG with one chunk damaged, and a checksum that says that all is well."""
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += size + 12
    wounded = int(rng.integers(len(chunks)))
    kind, content = chunks[wounded]
    chunks[wounded] = kind, damage(rng, content)
    number = lambda n: n.to_bytes(4, "big")  # noqa: E731
    sealed = (number(len(c)) + k + c + number(zlib.crc32(k + c)) for k, c in chunks)
    return data[:8] + b"".join(sealed)


def mutate(rng, value):
    """A JSON value with one place in it replaced, removed, added, or wrapped."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key, how = pick(rng, list(value)), rng.random()
        rest = {k: v for k, v in value.items() if k != key}
        if how < 0.1:
            return rest
        if how < 0.2:
            return value | {"brand_new": pick(rng, VALUES)}
        return rest | {key: mutate(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = int(rng.integers(len(value)))
        changed = [*value[:i], mutate(rng, value[i]), *value[i + 1 :]]
        return pick(rng, [changed, value[:i], value * 2])
    return [value] if rng.random() < 0.1 else pick(rng, VALUES)


def mutate_text(rng, text):
    """JSON text with a mutated value; now and then nested deeply, huge, or cut off. Another text,
    such as a checksum, becomes one of the values."""
    how = rng.random()
    if how < 0.04:
        return "[" * 100_000 + "]" * 100_000
    if how < 0.08:
        return text[: int(rng.integers(len(text) + 1))]
    if how < 0.1:
        return '{"a": ' * 5000 + "1" + "}" * 5000
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    return json.dumps(mutate(rng, value))


def damage_tensors(rng, data):
    """A safetensors file, wounded with knowledge of its header."""
    size = int.from_bytes(data[:8], "little")
    header, payload = json.loads(data[8 : 8 + size]), data[8 + size :]
    about = header.get("__metadata__", {})
    how = rng.random()
    if about and how < 0.5:  # the config, step or rng that the file carries
        name = pick(rng, list(about))
        about[name] = mutate_text(rng, about[name]) if rng.random() < 0.95 else "?"
    elif how < 0.6:
        header = mutate(rng, header)
    elif how < 0.75:
        header, payload = convert(rng, header, payload)
    elif how < 0.8:
        places = np.frombuffer(payload, "<f4").copy()
        places[rng.integers(len(places), size=3)] = pick(rng, [np.nan, np.inf, 1e38, -1e-38])
        payload = places.tobytes()
    else:
        return damage(rng, data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


ENCODED = {
    "F64": lambda x: x.astype("<f8"),
    "F16": lambda x: x.astype("<f2"),
    "BF16": lambda x: (x.view("<u4") >> 16).astype("<u2"),
    "F8_E4M3": lambda x: x.astype("u1"),
    "I32": lambda x: x.astype("<i4"),
    "BOOL": lambda x: x.astype(bool),
}


def convert(rng, header, payload):
    """All tensors, or some of them, in another dtype -> a header and a payload that fit."""
    dtype, share, parts, at = pick(rng, list(ENCODED)), pick(rng, [1, 0.3]), [], 0
    for name, about in header.items():
        if name == "__metadata__":
            continue
        begin, end = about["data_offsets"]
        part = payload[begin:end]
        if rng.random() < share:
            part = ENCODED[dtype](np.frombuffer(part, "<f4")).tobytes()
            about["dtype"] = dtype
        about["data_offsets"] = [at, at := at + len(part)]
        parts.append(part)
    return header, b"".join(parts)
