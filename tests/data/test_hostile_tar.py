"""No bytes of a tar can crash, hang or run anything: what cannot be used is left out by name, the rest is
right."""

import io
import json
import pickle
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmssl.config import ViewConfig
from mmssl.data import iter_samples
from mmssl.data.shards import BadSample, SampleLimits, index_shards
from mmssl.data.shards.groups import groups
from mmssl.data.shards.headers import TarError
from mmssl.data.shards.samples import SampleError, parse_sample
from mmssl.data.shards.shard_index import index_shard
from mmssl.data.shards.tar import Archive
from mmssl.data.transforms import Renderer
from mmssl.data.transforms.views import View
from mmssl.types import PipeCommand, Sample
from tests.helpers.images import png_of
from tests.helpers.tars import File, pair, tar_bytes, toy_stream

LIMITS = SampleLimits(100_000)
KEYS = ["a", "folder/b", "ü", f"{'d' * 60}/{'d' * 60}", "e"]


def corpus(fmt: int) -> bytes:
    """A shard of five samples with every kind of member."""
    files: list[File] = []
    for number, key in enumerate(KEYS):
        files += [*pair(key, 600 * number), (f"{key}.json", b'{"k": [1, 2]}'), (f"{key}.cls", b"%d" % number)]
    files.insert(5, ("README", b"none of a sample"))
    return tar_bytes(files, fmt)


def use(path: Path, content: bytes) -> tuple[list[Sample], list[tuple[str, str]], tuple[str, ...]]:
    """Index and read a shard: its samples, what is wrong with others, what is wrong with the shard."""
    path.write_bytes(content)
    found = index_shard(str(path), LIMITS)
    samples, wrong = [], [(out.key, out.reason) for out in found.left_out]
    for number, (start, stop) in enumerate(zip(*found.ranges(), strict=True)):
        try:
            samples.append(parse_sample(number, str(path), content[start:stop], LIMITS))
        except SampleError as error:
            wrong.append((error.key or "", str(error)))
    bad: list[BadSample] = []
    assert [s.key for s in iter_samples([str(path)], LIMITS, on_bad=bad.append)] == [s.key for s in samples]
    assert len(bad) >= len(wrong)
    return samples, wrong, found.problems


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_cut_anywhere_the_whole_samples_before_are_used_and_the_loss_is_named(tmp_path: Path, fmt: int) -> None:
    """At every block and beside it: samples that are whole come out equal; a cut sample is left out by
    name."""
    content = corpus(fmt)
    whole, wrong, problems = use(tmp_path / "x.tar", content)
    assert [s.key for s in whole] == KEYS
    assert not wrong
    assert not problems
    end = len(content.rstrip(b"\0"))
    for cut in sorted({at + d for at in range(0, end, 512) for d in (0, 1, 511)}):
        samples, wrong, problems = use(tmp_path / "x.tar", content[:cut])
        for sample, expected in zip(samples, whole, strict=False):
            assert (sample.key, sample.image, sample.fields.get("txt")) == (
                expected.key,
                expected.image,
                expected.fields.get("txt"),
            )
        assert problems, "a cut is always said"
        assert len(samples) + len(wrong) >= sum(content.find(f"{k}.txt".encode()) < cut - 1024 for k in ("a", "e"))


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_thousands_of_mutations_never_crash_and_never_mix_samples(tmp_path: Path, fmt: int) -> None:
    """Seeded bit flips, swapped, doubled and erased blocks: no other exception, and no image under a wrong
    key."""
    content, rng = corpus(fmt), random.Random(fmt)
    blocks = len(content) // 512
    changed = 0
    for _ in range(1000):
        mutant = bytearray(content)
        kind = rng.randrange(5)
        if kind <= 1:
            for _ in range(rng.choice([1, 1, 8, 64])):
                mutant[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            a, b = (512 * rng.randrange(blocks) for _ in range(2))
            if kind == 2:
                mutant[a : a + 512], mutant[b : b + 512] = mutant[b : b + 512], mutant[a : a + 512]
            elif kind == 3:
                mutant[a:a] = mutant[b : b + 512]
            else:
                del mutant[a : a + 512]
        samples, wrong, problems = use(tmp_path / "x.tar", bytes(mutant))
        changed += bool(wrong or problems or [s.key for s in samples] != KEYS)
        assert len({s.key for s in samples}) == len(samples)
    assert changed > 250


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=3000))
def test_noise_is_no_tar(content: bytes) -> None:
    """Any bytes at all end in samples or a TarError."""
    archive = Archive(lambda offset, count: content[offset : offset + count], len(content))
    try:
        found = list(groups(archive, LIMITS))
    except TarError:
        return
    assert found == []


def header(name: bytes = b"a.jpg", size: bytes = b"00000000001\0", kind: bytes = b"0") -> bytes:
    """One hand-made header with a right checksum."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (header(size=b"77777777777\0"), "is cut: 8589934591 bytes promised"),
        (header(size=b"\x80" + b"\xff" * 11), "is cut"),
        (header(size=b"\xff" * 12), "damaged header"),
        (header(size=b"-0000000001\0"), "damaged header"),
        (header(size=b"0x000000001\0"), "damaged header"),
        (header(size=b"1_000000000\0"), "damaged header"),
        (header(kind=b"L", size=b"77777777777\0"), "more than 1 MiB"),
        (header(kind=b"x", size=b"00000001000\0") + b"9" * 512, "damaged pax header"),
        (header(kind=b"x", size=b"00000001000\0") + b"0 a=b\n".ljust(512, b" "), "damaged pax header"),
        (header(kind=b"x", size=b"00000001000\0") + b"99 a=b\n".ljust(512, b" "), "damaged pax header"),
        (header(kind=b"x", size=b"00000000020\0") + b"16 size=10000000\n"[:16].ljust(512, b"\0"), "damaged pax"),
        (header(kind=b"x", size=b"00000000013\0") + b"11 size=-1\n".ljust(512, b"\0") + header(), "damaged pax"),
        (header(kind=b"L") + b"x".ljust(512, b"\0"), "ends after a long name"),
        (header(kind=b"L", size=b"00000002000\0") + bytes(512), "ends inside a long name"),
    ],
)
def test_lying_headers_are_named(tmp_path: Path, content: bytes, says: str) -> None:
    """Sizes beyond the file, negative or no numbers, endless names, records that lie about their length."""
    samples, _, problems = use(tmp_path / "x.tar", content)
    assert not samples
    assert len(problems) == 1
    assert says in problems[0]


def test_pax_records_of_every_length_are_linear_work() -> None:
    """A mebibyte of tiny records is parsed in one go, not once per record."""
    record = b"6 a=b\n"
    content = record * ((1 << 20) // len(record))
    block = header(kind=b"x", size=b"%011o\0" % len(content))
    data = block + content.ljust(-(-len(content) // 512) * 512, b"\0") + header() + bytes(512)
    archive = Archive(lambda offset, count: data[offset : offset + count], len(data))
    assert [member.name for member in archive.members()] == ["a.jpg"]


def test_pax_records_name_and_measure_members(tmp_path: Path) -> None:
    """A path and a size in a pax header replace the header's own; Python's tarfile agrees."""
    name = "é" * 60
    records = f"{len(name.encode()) + 14} path={name}.jpg\n".encode() + b"12 size=700\n"
    data = header(kind=b"x", size=b"%011o\0" % len(records)) + records.ljust(512, b"\0")
    data += header(size=b"00000000000\0") + b"i" * 1024 + header(f"{'é' * 45}.txt".encode()) + bytes(512 * 3)
    members = list(Archive(lambda offset, count: data[offset : offset + count], len(data)).members())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(m.name, m.size) for m in members] == [(m.name, m.size) for m in tar]
    assert members[0].size == 700


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_nothing_in_a_shard_is_executed(tmp_path: Path) -> None:
    """Pickles under every name that decoders know are never opened, in any way of reading."""
    pickle_bytes = pickle.dumps(Bomb(tmp_path / "executed"))
    names = ("pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "mp", "msg", "ten", "tb", "cbor", "th", "py")
    files = [f for i in range(8) for f in (*pair(f"{i}"), *((f"{i}.{name}", pickle_bytes) for name in names))]
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(files))
    assert len(list(iter_samples([str(path)]))) == 8
    index_shards([str(path)], LIMITS)
    for shard in (str(path), PipeCommand(f"pipe:cat {path}")):
        with toy_stream([shard], lanes=1) as stream:
            assert len(next(stream)) == 8
    assert not (tmp_path / "executed").exists()


OVERSIZE = bytes.fromhex("89504e470d0a1a0a0000000d49484452000051fe0000740408060000000f8874f2000000004944415435af061e")
"""How two stop signs of Debian's openclipart-png begin, both alike: 20,990 x 29,700 pixels in 2.8 MB. Pillow refuses
them as decompression bombs. Their pixels are left out."""


def test_oversize_images_are_named_and_replaced_before_a_pixel_is_decoded(tmp_path: Path) -> None:
    """Two real ones and a made-up one of 600 megapixels, of which nothing but the header is there to be decoded."""
    small = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(small, "PNG")
    huge = {"stop_sign_right_font_mig_": OVERSIZE, "stop_sign_miguel_s_nchez_": OVERSIZE, "z": png_of(30_000, 20_000)}
    contents = {**huge, **{f"good{i}": small.getvalue() for i in range(13)}}
    path, log = tmp_path / "x.tar", tmp_path / "bad.jsonl"
    path.write_bytes(
        tar_bytes(f for key, content in contents.items() for f in ((f"{key}.png", content), (f"{key}.txt", b"a")))
    )
    render = Renderer({"main": View(ViewConfig(), 16)}, ["{txt}"], seed=0)
    with toy_stream([str(path)], render=render, max_bad_fraction=1.0, bad_log=log) as stream:
        batches = [next(stream) for _ in range(2)]
        assert stream.counters().bad_samples == 3
    for batch in batches:
        assert (batch.views["main"] == torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)).all()
    named = {line["key"]: line["error"] for line in map(json.loads, log.read_text().splitlines())}
    assert named.keys() == huge.keys()
    assert "20990 x 29700 pixels" in named["stop_sign_right_font_mig_"]
    assert "30000 x 20000 pixels" in named["z"]


def test_endless_nothing_is_said_and_not_waited_for(tmp_path: Path) -> None:
    """Zeros, as of a disk image, are damage; a shard of folders only holds no sample. Both end at once."""
    samples, wrong, problems = use(tmp_path / "x.tar", bytes(1 << 20))
    assert (samples, wrong) == ([], [])
    assert "holds only zeros" in problems[0]
    folders = b"".join(header(b"d%d/" % i, b"00000000000\0", b"5") for i in range(100)) + bytes(1024)
    assert use(tmp_path / "x.tar", folders) == ([], [], ())
