"""Tars made to be read differently: mutated headers, chains of long names and pax records, holes and cuts.

And what other programs read in them: Python's tarfile and GNU tar.
"""

import io
import random
import re
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.tars import tar_bytes

View = list[tuple[str, bytes]]
"""Names and bytes of the regular files that a program reads, in order."""
FIELDS = {
    "name": (0, 100),
    "mode": (100, 108),
    "uid": (108, 116),
    "gid": (116, 124),
    "size": (124, 136),
    "mtime": (136, 148),
    "type": (156, 157),
    "linkname": (157, 257),
    "magic": (257, 263),
    "version": (263, 265),
    "devmajor": (329, 337),
    "devminor": (337, 345),
    "prefix": (345, 500),
    "isextended": (482, 483),
    "realsize": (483, 495),
}
"""Begin and end of the fields of a header in bytes."""
TYPES = b"0000\x007123456SxxXggLLKVMND Z"
NUMBERS = (
    b"",
    b"0",
    b" 12 ",
    b"00000000400\0",
    b"0001\0junk",
    b"0o17",
    b"1_0",
    b"-1",
    b"+5",
    b"12 34",
    b"777777777777",
)
BINARY = (
    b"\x80" + b"\0" * 10 + b"\x10",
    b"\xff" * 12,
    b"\x80\0\0\0\0\0\2\0",
    b"\x81\0\0\0\0\0\0\0\0\0\0\5",
    b"\xc3\xa4",
)
NAMES = (
    b"",
    b"a.jpg",
    b"a.txt",
    b"b.jpg/",
    b"c.txt\0.jpg",
    b"\xff\xfe.jpg",
    b"d\n.jpg",
    b"\x1b[2J.jpg",
    "ü.txt".encode(),
    b"n" * 100,
)
MAGIC = (b"ustar\0", b"ustar ", b"\0" * 6, b"ustarX", b"USTAR\0")
KEYS = (
    b"path",
    b"path",
    b"size",
    b"size",
    b"linkpath",
    b"mtime",
    b"uid",
    b"comment",
    b"hdrcharset",
    b"GNU.sparse.name",
)
MORE_KEYS = (
    b"GNU.sparse.size",
    b"GNU.sparse.realsize",
    b"GNU.sparse.map",
    b"SCHILY.realsize",
    b"",
    b"path\0x",
    b"s ize",
)
VALUES = (
    b"",
    b"0",
    b"5",
    b"512",
    b"1024",
    b"+7",
    b" 7",
    b"1_0",
    b"9" * 25,
    b"BINARY",
    b"\xff",
    b"a=b",
    b"1 path=z.jpg\n",
)
_LISTED = re.compile(
    rb"(?P<kind>.)[-a-zA-Z]{9} .*? +(?P<size>[\d,]+) (?P<time>\S+ \d\d:\d\d(:\d\d)?) (?P<name>.*)", re.DOTALL
)
"""A line of GNU tar's listing: kind and mode, owner and group, size (of devices their numbers), date, time and name."""
_ESCAPE = re.compile(rb"\\([0-7]{3}|.)", re.DOTALL)
_LETTERS = {b"n": b"\n", b"t": b"\t", b"b": b"\b", b"r": b"\r", b"f": b"\f", b"v": b"\v", b"a": b"\a"}


@dataclass
class Part:
    """A header and what follows it."""

    header: bytearray
    content: bytes


def header(name: bytes, size: int, kind: bytes = b"0") -> bytearray:
    """A ustar header without its checksum."""
    block = bytearray(512)
    block[: len(name[:100])] = name[:100]
    for begin, digits in ((100, b"0000644"), (108, b"0000000"), (116, b"0000000"), (136, b"00000000000")):
        block[begin : begin + len(digits)] = digits
    block[124:136] = b"%011o\0" % size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    return block


def signed(block: bytearray) -> bytearray:
    """The header with its checksum."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return block


def record(key: bytes, value: bytes) -> bytes:
    """A pax record."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while length != len(rest) + len(b"%d" % length):
        length = len(rest) + len(b"%d" % length)
    return b"%d" % length + rest


def _parts(content: bytes) -> list[Part]:
    """The headers of a sound archive."""
    parts, at = [], 0
    while content[at : at + 512].strip(b"\0"):
        size = -(-int(content[at + 124 : at + 135], 8) // 512) * 512
        parts.append(Part(bytearray(content[at : at + 512]), content[at + 512 : at + 512 + size]))
        at += 512 + size
    return parts


def _samples(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    hidden = tar_bytes([("hidden.jpg", rng.randbytes(20)), ("hidden.txt", b"hidden")])[:2048]
    for key in rng.sample(["a", "b", "folder/c", "ü", "d" * 60 + "/" + "d" * 60, "e" * 96], 3):
        image = rng.choice([rng.randbytes(rng.choice([0, 40, 512, 700, 1300])), hidden, hidden + rng.randbytes(30)])
        yield f"{key}.jpg", image
        yield f"{key}.txt", b"caption " + rng.randbytes(4).hex().encode()


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def _extension(rng: random.Random) -> Part:
    """A long name or pax records, sound or not."""
    kind = rng.choice([b"x", b"x", b"x", b"X", b"g", b"L", b"L", b"K"])
    if kind in (b"L", b"K"):
        content = rng.choice(NAMES) + rng.choice([b"\0", b"\0", b"", b"\0junk"])
    else:
        keys = [rng.choice(KEYS if rng.random() < 0.8 else MORE_KEYS) for _ in range(rng.randint(1, 3))]
        content = b"".join(
            record(key, rng.choice(NAMES if key == b"path" and rng.random() < 0.8 else VALUES)) for key in keys
        )
    size = len(content)
    if rng.random() < 0.2:
        content = _mutate_bytes(rng, content)
    if rng.random() < 0.1:
        size = max(0, size + rng.choice([-5, -1, 1, 5]))
    padded = _padded(content)
    if rng.random() < 0.1 and len(padded) > len(content) + 40:
        padded = content + record(b"path", b"padding.jpg") + padded[len(content) + 21 :]
    return Part(header(b"././@LongLink", size, kind), padded[: -(-max(len(padded), 1) // 512) * 512])


def _mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 3])):
        if changed:
            changed[rng.randrange(len(changed))] = rng.choice([0, 10, 32, 48, 49, 57, 61, rng.randrange(256)])
    return bytes(changed)


def _mutate_field(rng: random.Random, part: Part) -> None:
    field = rng.choice([*FIELDS, "size", "size", "type", "type", "name", "prefix", "magic"])
    begin, end = FIELDS[field]
    values: Sequence[bytes] = {
        "name": NAMES,
        "linkname": NAMES,
        "prefix": (b"p", b"p/q", b"\0x", b"12345\0"),
        "type": [TYPES[i : i + 1] for i in range(len(TYPES))],
        "magic": MAGIC,
        "version": (b"00", b" \0", b"\0\0"),
        "isextended": (b"\1", b"\0"),
    }.get(field, (*NUMBERS, *BINARY, b"%o\0" % rng.choice([0, 1, 511, 512, 513, 1024, 5000])))
    part.header[begin:end] = rng.choice(values)[: end - begin].ljust(end - begin, b"\0")


def _mutate_parts(rng: random.Random, parts: list[Part]) -> None:
    at = rng.randrange(len(parts))
    match rng.randrange(8):
        case 0 | 1 | 2:
            _mutate_field(rng, parts[at])
        case 3 | 4:
            for _ in range(rng.choice([1, 1, 2])):
                parts.insert(at, _extension(rng))
        case 5:
            parts[at].content = _mutate_bytes(rng, parts[at].content)
        case 6:
            bit = rng.randrange(8 * 512)
            parts[at].header[bit // 8] ^= 1 << bit % 8
        case _:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]


def _mutate_blocks(rng: random.Random, content: bytearray) -> None:
    a, b = (512 * rng.randrange(len(content) // 512) for _ in range(2))
    match rng.randrange(6):
        case 0:
            content[a : a + rng.choice([512, 1024, 4096])] = b""
        case 1:
            content[a:a] = content[b : b + rng.choice([512, 1024])]
        case 2:
            length = min(rng.choice([100, 512, 1024, 4096]), len(content) - a)
            content[a : a + length] = bytes(length)
        case 3:
            del content[a + rng.choice([0, 1, 511]) :]
        case 4:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case _:
            content += rng.choice([b"x" * 512, bytes(20_000)])


def hostile_tar(seed: int) -> bytes:
    """An archive of three samples, mutated in one to four ways; the same one for each seed."""
    rng = random.Random(seed)
    fmt = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[seed % 3]
    parts = _parts(tar_bytes(_samples(rng), fmt))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        _mutate_parts(rng, parts)
    for part in parts:
        if rng.random() < 0.98:
            signed(part.header)
    content = bytearray(b"".join(bytes(part.header) + part.content for part in parts) + bytes(1024))
    if rng.random() < 0.3:
        _mutate_blocks(rng, content)
    return bytes(content)


def by_tarfile(content: bytes) -> View:
    """What Python's tarfile reads, up to its first error."""
    found: View = []
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for info in tar:
                if info.isreg() and not info.issparse():
                    data = content[info.offset_data : info.offset_data + info.size]
                    if info.size >= 0 and len(data) == info.size:
                        found.append((text(info.name.encode("utf-8", "surrogateescape")), data))
    except Exception:  # tarfile raises any kind of exception on broken archives
        return found
    return found


def by_gnu_tar(folder: Path, names: Sequence[str]) -> list[View]:
    """What GNU tar extracts of each archive of a folder, which are all its tars, up to the first error."""
    # Through a pipe: GNU tar cuts a file to which it writes a sparse member.
    script = (
        "for f in *.tar; do tar --extract --to-stdout --verbose --verbose --quoting-style=escape "
        '--index-file="$f.list" --absolute-names --file="$f" 2>/dev/null < /dev/null | cat > "$f.data"; done'
    )
    subprocess.run(
        ["sh", "-c", script], cwd=folder, check=True, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
    )
    return [_gnu_view(folder / name) for name in names]


def _gnu_view(path: Path) -> View:
    found: View = []
    data, at, widest = path.with_name(f"{path.name}.data").read_bytes(), 0, 0
    for line in path.with_name(f"{path.name}.list").read_bytes().splitlines():
        fields = _LISTED.fullmatch(line)
        if fields is None:
            break
        # Times are padded to the widest so far; further spaces begin the name.
        widest = max(widest, len(fields["time"]))
        if fields["kind"] in b"-C":
            size, name = int(fields["size"]), fields["name"][widest - len(fields["time"]) :]
            found.append((text(_unquoted(name)), data[at : at + size]))
            at += size
    return found


def _unquoted(name: bytes) -> bytes:
    """A name without the escapes of GNU tar."""
    return _ESCAPE.sub(
        lambda found: bytes([int(found[1], 8)]) if found[1].isdigit() else _LETTERS.get(found[1], found[1]), name
    )


def text(name: bytes) -> str:
    """A name as mmssl writes it."""
    return name.decode("utf-8", errors="backslashreplace")
