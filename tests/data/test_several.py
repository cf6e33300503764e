"""Samples with several images and several captions, from the tar to the batch, the health report and the evaluation."""

import io
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmssl.config import ViewConfig
from mmssl.data import LoaderConfig, Source, TrainLoader, iter_samples, resolve_sources
from mmssl.data.health import check_health, survey_shards
from mmssl.data.packing.packer import pack
from mmssl.data.packing.shard_records import ShardRecords
from mmssl.data.packing.tables import open_records
from mmssl.data.transforms.captions import IMAGE_ORDER, sample_captions
from mmssl.data.transforms.render import Renderer
from mmssl.data.transforms.views import View
from mmssl.evaluate import open_dataset, suite
from mmssl.evaluate.datasets import read, sample_numbers
from mmssl.types import Batch, Sample
from tests.helpers.tars import tar_bytes, toy_tokenize
from tests.helpers.toy_encoder import ToyEncoder, paint

PLAIN = ViewConfig(crop_scale=(1.0, 1.0))


def colour(number: int) -> bytes:
    """A PNG of one gray value."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number,) * 3).save(file, "PNG")
    return file.getvalue()


LAYOUTS = {
    "numbered images": (["s.10.png", "s.2.png", "s.txt"], ["2", "10"], ["s.txt"]),
    "images and json": (["s.0.png", "s.1.png", "s.2.png", "s.json"], ["0", "1", "2"], ["json 0", "json 1"]),
    "numbered captions": (["s.png", "s.0.txt", "s.11.txt", "s.3.txt"], ["s"], ["s.0.txt", "s.3.txt", "s.11.txt"]),
    "one of each": (["s.png", "s.txt"], ["s"], ["s.txt"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbered_members_belong_to_one_sample(tmp_path: Path, layout: str) -> None:
    """KEY.0.jpg, KEY.1.jpg and KEY.0.txt, KEY.1.txt are images and captions of KEY, in the order of their numbers; the
    index, which reads headers only, counts one sample too."""
    names, images, captions = LAYOUTS[layout]
    files = []
    for name in names:
        number = int(name.split(".")[1]) if name.endswith("png") and name.count(".") == 2 else 7
        tree = json.dumps({"text": "json 0", "captions": ["json 0", "json 1"]}).encode()
        text = tree if name.endswith("json") else name.encode()
        files.append((name, colour(number) if name.endswith("png") else text))
    (tmp_path / "a.tar").write_bytes(tar_bytes([*files, ("t.png", colour(1)), ("t.txt", b"another")]))
    first, second = iter_samples([str(tmp_path / "a.tar")], on_bad=lambda bad: pytest.fail(bad.error))
    assert (first.key, second.key) == ("s", "t")
    assert [first.image, *first.more_images] == [colour(7 if stem == "s" else int(stem)) for stem in images]
    found = first.fields.get("captions", [first.fields.get("txt")])
    assert found == captions
    (source,) = resolve_sources([str(tmp_path / "a.tar")])
    assert len(survey_shards(source.shards)) == 2


def test_dotted_pairs_stay_samples_of_their_own(tmp_path: Path) -> None:
    """KEY.0.jpg with KEY.0.txt and KEY.1.jpg with KEY.1.txt are two samples, as before."""
    files = [(f"s.{i}.{e}", colour(i) if e == "png" else b"words") for i in (0, 1) for e in ("png", "txt")]
    (tmp_path / "a.tar").write_bytes(tar_bytes(files))
    found = list(iter_samples([str(tmp_path / "a.tar")]))
    assert [(sample.key, sample.more_images) for sample in found] == [("s.0", ()), ("s.1", ())]


def several(number: int, images: int = 3, captions: int = 3) -> Sample:
    """A sample whose images are gray values and whose captions are numbered."""
    texts = [f"caption {number} {i}" for i in range(captions)]
    first, *more = (colour(40 * i + number) for i in range(images))
    return Sample(number, "a.tar", str(number), first, {"txt": texts[0], "captions": texts}, tuple(more))


def shown(views: torch.Tensor) -> list[int]:
    """The gray value of each image."""
    return [int(view.float().mean().round()) for view in views]


def test_images_and_captions_are_drawn_by_seed_epoch_and_sample() -> None:
    """Each epoch shows one image of a sample in all its views and one caption, each about equally often; `main.1` shows
    another image, and the second caption is another one. The draw does not depend on the other samples."""
    views = {name: View(PLAIN, 8) for name in ("main", "simclr_1", "main.1", "main.3")}
    renderer = Renderer(views, ["{captions}"], 3, captions=4)
    samples = [several(i) for i in range(20)]
    drawn, said = Counter[int](), Counter[str]()
    for epoch in range(30):
        found = renderer(samples, epoch)
        alone = renderer([samples[7]], epoch)
        assert torch.equal(alone.views["main.1"][0], found.views["main.1"][7])
        main, twin, other, again = (shown(found.views[name]) for name in views)
        assert main == twin == again, "the fourth of three images is the first again"
        assert all(a != b for a, b in zip(main, other, strict=True))
        assert {(gray - i) % 40 for i, gray in enumerate(main)} == {0}
        for row, texts in enumerate(zip(found.texts, *found.more_texts, strict=True)):
            assert set(texts[:3]) == set(samples[row].fields["captions"])
            assert texts[3] == texts[0]
            said[texts[0][-1]] += 1
        drawn.update((gray - i) // 40 for i, gray in enumerate(main))
    assert min(*drawn.values(), *said.values()) > 600 / 3 - 4 * 12
    assert len(drawn) == len(said) == 3
    assert shown(Renderer(views, ["{txt}"], 4)(samples, 0).views["main"]) != shown(renderer(samples, 0).views["main"])


def test_one_image_shows_again_and_one_caption_repeats() -> None:
    """A sample with one image and one caption fills the places of several; a damaged further image is a bad sample."""
    views = {name: View(ViewConfig(crop_scale=(0.3, 0.6)), 8) for name in ("main", "main.1")}
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(file, "PNG")
    single = Sample(0, "a.tar", "0", file.getvalue(), {"txt": "words"})
    broken = Sample(1, "a.tar", "1", colour(1), {"txt": "words"}, (b"no image", b"no image"))
    found = Renderer(views, ["{txt}"], 0, captions=2)([single, broken], epoch=0)
    assert found.more_texts[0][0] == found.texts[0] == "words"
    assert not torch.equal(found.views["main"][0], found.views["main.1"][0])
    assert [row for row, _ in found.bad] == [1]
    assert (found.texts[1], found.more_texts[0][1]) == ("", "")


def test_templates_are_drawn_by_weight() -> None:
    """A template of weight 3 is drawn three times as often as one of weight 1; without weights all alike."""
    samples = [Sample(i, "a.tar", str(i), b"", {"txt": "a", "alt": "b"}) for i in range(2000)]
    for templates, expected in (({"{txt}": 3.0, "{alt}": 1.0}, 0.75), (["{txt}", "{alt}"], 0.5)):
        texts = Renderer({}, templates, 0)(samples, epoch=0).texts
        assert texts.count("a") / 2000 == pytest.approx(expected, abs=4 * 0.5 / 2000**0.5)


def loader(shard: Path, rank: int = 0, world_size: int = 1, workers: int = 0) -> TrainLoader:
    """Batches of 6 with two images and two captions of each sample."""
    renderer = Renderer({n: View(ViewConfig(flip=0.5), 8) for n in ("main", "main.1")}, ["{txt}"], 5, captions=2)
    config = LoaderConfig(5, 6, rank=rank, world_size=world_size, workers=workers)
    return TrainLoader([Source([str(shard)])], config, renderer, toy_tokenize)


def inputs_of(batches: list[Batch]) -> list[torch.Tensor]:
    """Images and tokens of the ranks' parts of a batch, joined; padding does not count."""
    tokens = [[row[row > 0].tolist() for b in batches for row in b.more_tokens["tokens.1"]]]
    flat = torch.tensor([n for rows in tokens for row in rows for n in (*row, -1)])
    return [*(torch.cat([b.views[name] for b in batches]) for name in ("main", "main.1")), flat]


def test_any_world_and_workers_and_a_resume_give_the_same_batches(tmp_path: Path) -> None:
    """Further images and captions are those of one rank without workers; a state continues at the next sample."""
    files = []
    for i in range(24):
        sample = several(i, images=1 + i % 3, captions=1 + i % 2)
        pictures = [sample.image, *sample.more_images]
        files += [(f"{i:02}.{n}.png" if len(pictures) > 1 else f"{i:02}.png", p) for n, p in enumerate(pictures)]
        files.append((f"{i:02}.txt", "\n".join(sample.fields["captions"]).encode()))
    (tmp_path / "a.tar").write_bytes(tar_bytes(files))
    with loader(tmp_path / "a.tar") as alone:
        expected = [inputs_of([batch]) for batch in islice(alone, 7)]
        assert alone.samples == 24
    with loader(tmp_path / "a.tar", 0, 2, 2) as first, loader(tmp_path / "a.tar", 1, 2, 1) as second:
        for number in range(7):
            for found, wanted in zip(inputs_of([next(first), next(second)]), expected[number], strict=True):
                assert torch.equal(found, wanted)
            state = first.state_dict()
            if number == 3:
                first.load_state_dict(state)


def test_pack_writes_them_and_check_counts_them(tmp_path: Path) -> None:
    """Numbered files of a folder, several columns of a table and shards are packed as samples with several images and
    captions, which `check` counts; packed again they are the same."""
    source = tmp_path / "photos"
    source.mkdir()
    images = {"a.0.png": colour(10), "a.1.png": colour(20), "b.png": colour(30), "c.png": colour(40)}
    texts = {"a.txt": "two images", "b.0.txt": "one", "b.1.txt": "two", "b.10.txt": "ten", "c.txt": "c"}
    for name, content in (images | {name: text.encode() for name, text in texts.items()}).items():
        (source / name).write_bytes(content)
    table = source / "t.csv"
    table.write_text("photo,back,caption,alt\na.0.png,a.1.png,two images,\nb.png,,one,two\nc.png,,c,\n")
    expected = {
        "folder": {10: ((20,), ["two images"]), 30: ((), ["one", "two", "ten"]), 40: ((), ["c"])},
        "table": {10: ((20,), ["two images"]), 30: ((), ["one", "two"]), 40: ((), ["c"])},
    }
    values = {colour(gray): gray for gray in (10, 20, 30, 40)}
    for kind, records in (
        ("folder", open_records(source)),
        ("table", open_records(table, "photo, back", "caption,alt")),
    ):
        packed = pack(records, tmp_path / kind)
        assert packed.account.omitted == 0, packed.account.text()
        shards = [str(path) for path in packed.shards["train"]]
        again = pack(ShardRecords(shards), tmp_path / f"{kind} again")
        for names in (shards, [str(path) for path in again.shards["train"]]):
            found = {
                values[s.image]: (tuple(values[m] for m in s.more_images), sample_captions(s.fields))
                for s in iter_samples(names)
            }
            assert found == expected[kind]
        counts = check_health(survey_shards(shards)).samples
        assert (counts["with several images"], counts["images of all samples"]) == (1, 4)
        total = sum(len(said) for _, said in expected[kind].values())
        assert (counts["with several captions"], counts["captions of all samples"]) == (1, total)


def test_retrieval_counts_every_image(tmp_path: Path) -> None:
    """Captions find any image of their sample and images any caption of theirs; recalls and the number of candidates
    are those of a loop over all images and captions, and keys name each image."""
    rng, files = np.random.default_rng(1), []
    for i in range(12):
        images = [paint(i, variant) for variant in range(1 + i % 3)]
        files += [(f"{i:02}.{n}.png" if len(images) > 1 else f"{i:02}.png", image) for n, image in enumerate(images)]
        files.append((f"{i:02}.txt", "\n".join(f"number {j} {i}" for j in range(1 + i % 2)).encode()))
    (tmp_path / "test-0.tar").write_bytes(tar_bytes(files))
    (tmp_path / "dataset_type.txt").write_text("retrieval")
    encoder = ToyEncoder(noise=3.0 + float(rng.random()))
    metrics = suite.run(encoder, {"d": (tmp_path, "retrieval")}, tmp_path / "out")["d/retrieval"]
    rows = list(read(open_dataset(tmp_path)))
    owners = [int(row.key[:2]) for row in rows]
    assert sample_numbers(rows) == owners
    assert [row.key for row in rows[:4]] == ["00", "01", "01#1", "02"]
    assert (metrics["samples"], metrics["images"], metrics["captions"]) == (12, 24, 18)
    images = encoder.encode_image([row.image for row in rows])
    captions = [(i, f"number {j} {i}") for i in range(12) for j in range(1 + i % 2)]
    texts = encoder.encode_text([text for _, text in captions])
    hits = [owners[int((images @ text).argmax())] == i for (i, _), text in zip(captions, texts, strict=True)]
    assert metrics["image_retrieval_recall@1"] == pytest.approx(sum(hits) / 18)
    hits = [captions[int((texts @ image).argmax())][0] == i for i, image in zip(owners, images, strict=True)]
    assert metrics["text_retrieval_recall@1"] == pytest.approx(sum(hits) / 24)
    assert 0 < sum(hits) < 24


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"caption": ["", "a cat", None, "a tabby"]}, ["a cat", "a tabby"]),
        ({"txt": ["a cat", "a tabby"]}, ["a cat", "a tabby"]),
        ({"caption": "", "title": "a cat"}, ["a cat"]),
        ({"caption": None, "prompt": "a cat"}, ["a cat"]),
        ({"caption": [1, 2], "text": "a cat"}, ["a cat"]),
    ],
)
def test_captions_of_the_json_stand_for_a_missing_text(
    tmp_path: Path, fields: dict[str, Any], expected: list[str]
) -> None:
    """A list under a usual name holds the captions, and empty ones are passed over: `pack` and training agree."""
    (tmp_path / "a.tar").write_bytes(tar_bytes([("a.png", colour(1)), ("a.json", json.dumps(fields).encode())]))
    (sample,) = iter_samples([str(tmp_path / "a.tar")])
    assert sample_captions(sample.fields) == expected
    assert sample.caption == expected[0]
    packed = pack(ShardRecords([str(tmp_path / "a.tar")]), tmp_path / "out")
    (again,) = iter_samples([str(path) for path in packed.shards["train"]])
    assert sample_captions(again.fields) == expected


def test_the_code_of_the_order_is_that_of_the_images_shown() -> None:
    """Three of five gray images are shown in an order that changes with the epoch: the code ranks them by their place
    in the sample; a sample with one image has the code 1."""
    samples = [Sample(0, "a", "k", colour(10), {"txt": "x"}, tuple(colour(20 * n) for n in range(1, 5)))]
    samples.append(Sample(1, "a", "l", colour(3), {"txt": "y"}))
    views = {name: View(PLAIN, 8) for name in ("main", "main.1", "main.2")}
    renderer = Renderer(views, ["{txt}"], 0, groups=[IMAGE_ORDER])
    codes = set()
    for epoch in range(8):
        found = renderer(samples, epoch)
        grays = [int(found.views[name][0].float().mean().round()) for name in views]
        code, single = found.groups[IMAGE_ORDER].tolist()
        ranks = [code >> 4 * place & 15 for place in range(3)]
        assert np.argsort(ranks).tolist() == np.argsort(grays).tolist()
        assert single == 1
        codes.add(code)
    assert len(codes) > 3
