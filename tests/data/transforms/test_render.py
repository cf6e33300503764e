"""The renderer: keyed randomness, shared decoding, bad samples."""

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

from mmssl.config import ViewConfig
from mmssl.data.loading.parts import compose
from mmssl.data.transforms import render
from mmssl.data.transforms.augment import finish_views
from mmssl.data.transforms.captions import render_caption
from mmssl.data.transforms.decoding import Header, Pixels, decode
from mmssl.data.transforms.render import Renderer
from mmssl.data.transforms.views import View
from mmssl.errors import UserError
from mmssl.rng import generator
from mmssl.types import Batch, Sample
from tests.helpers.images import encode, photo

BUSY = ViewConfig(
    crop_scale=(0.3, 1.0),
    flip=0.5,
    affine=0.5,
    color_jitter=0.8,
    gray=0.2,
    invert=0.2,
    solarize=0.2,
    blur=0.5,
    erase=0.5,
)


def samples(count: int = 7) -> list[Sample]:
    """Photographs with captions."""
    formats = ("JPEG", "PNG", "WEBP")
    return [
        Sample(
            id=100 + i,
            shard="a.tar",
            key=f"{i:03}",
            image=encode(photo(60 + i, 80), formats[i % 3]),
            fields={"txt": f"caption {i}", "tags": ["a", "b", "c"]},
        )
        for i in range(count)
    ]


def renderer(seed: int = 0, mode: str = "quality") -> Renderer:
    """Two views of different sizes."""
    views = {"main": View(ViewConfig(), 32, mode=mode), "simclr_a": View(BUSY, 24, mode=mode)}  # type: ignore[arg-type]
    return Renderer(views, ["{txt}", "{txt}: {tags}"], seed)


def test_shapes_and_order() -> None:
    """Every view is uint8 [n, 3, S, S] in the samples' order, with one caption each."""
    rendered = renderer()(samples(), epoch=0)
    assert {name: tuple(view.shape) for name, view in rendered.views.items()} == {
        "main": (7, 3, 32, 32),
        "simclr_a": (7, 3, 24, 24),
    }
    assert all(view.dtype == torch.uint8 and view.is_contiguous() for view in rendered.views.values())
    assert [text.split(":")[0] for text in rendered.texts] == [f"caption {i}" for i in range(7)]
    assert rendered.bad == []


@pytest.mark.parametrize("mode", ["quality", "fast"])
def test_a_samples_rendering_is_its_own(mode: str) -> None:
    """Images and caption depend on (seed, epoch, sample id) alone: not on batch, order or process."""
    whole = renderer(mode=mode)(samples(), epoch=3)
    copy = pickle.loads(pickle.dumps(renderer(mode=mode)))
    for row in reversed(range(7)):
        alone = copy(samples()[row : row + 1], epoch=3)
        assert alone.texts == [whole.texts[row]]
        for name, view in whole.views.items():
            assert torch.equal(alone.views[name][0], view[row])


def test_seed_epoch_and_id_matter() -> None:
    """Another seed, epoch or id gives another rendering; another view name too."""
    sample = samples(1)[0]
    base = renderer()([sample], epoch=0).views["simclr_a"]
    other_id = Sample(101, sample.shard, sample.key, sample.image, sample.fields)
    assert not torch.equal(base, renderer()([sample], epoch=1).views["simclr_a"])
    assert not torch.equal(base, renderer(seed=1)([sample], epoch=0).views["simclr_a"])
    assert not torch.equal(base, renderer()([other_id], epoch=0).views["simclr_a"])
    twins = Renderer({"a": View(BUSY, 24), "b": View(BUSY, 24)}, ["{txt}"], 0)([sample], epoch=0)
    assert not torch.equal(twins.views["a"], twins.views["b"])


def test_a_view_renders_as_it_does_alone() -> None:
    """The renderer's view is `View` with the generator keyed by seed, name, epoch and id."""
    for sample in samples(3):
        expected = View(BUSY, 24)(sample.image, generator(0, "view", "simclr_a", 5, sample.id))
        assert torch.equal(renderer()([sample], epoch=5).views["simclr_a"][0], expected)


def test_views_may_be_augmented_on_the_device() -> None:
    """Views that are cropped first and augmented later, in other batches, equal those rendered at once to 1/255; a view
    without augmentations comes without parameters."""
    views = {"main": View(ViewConfig(), 32), "busy": View(BUSY, 24)}
    at_once = Renderer(views, ["{txt}"], 0)(samples(), epoch=3)
    later = pickle.loads(pickle.dumps(Renderer(views, ["{txt}"], 0, augment_on_device=True)))
    broken = Sample(9, "a.tar", "9", b"no image", {"txt": "x"})
    parts = [later([samples()[0], broken], epoch=3), later(samples()[1:], epoch=3)]
    # A part of two pieces, one with a hole.
    composed = compose([([6], [0], parts[0]), (list(range(6)), list(range(6)), parts[1])], 7)
    images, augment_params, texts = composed.views, composed.augment_params, composed.texts
    assert (augment_params.keys(), at_once.augment_params) == ({"busy"}, {})
    ids = torch.arange(7)
    batch = Batch(images, ids[:, None], ids[:, None] > -1, ids, texts, augment_params)
    halves = [
        finish_views(half, {"main": ViewConfig(), "busy": BUSY}) for half in (batch.slice(0, 3), batch.slice(3, 7))
    ]
    assert all(half.augment_params == {} for half in halves)
    order = [1, 2, 3, 4, 5, 6, 0]
    assert torch.equal(torch.cat([half.views["main"] for half in halves]), at_once.views["main"][order])
    found, expected = torch.cat([half.views["busy"] for half in halves]).int(), at_once.views["busy"][order].int()
    assert (found - expected).abs().max() <= 1
    assert (found != expected).float().mean() < 0.001
    assert (images["busy"].int() - expected).abs().float().mean() > 5


def test_each_image_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All views share one decode, at the smallest reduction that serves each of them."""
    reductions = []

    def spy(image: bytes, header: Header, reduce: int) -> Pixels:
        reductions.append(reduce)
        return decode(image, header, reduce)

    monkeypatch.setattr(render, "decode", spy)
    large = Sample(0, "a.tar", "0", encode(photo(512, 512), "JPEG"), {"txt": "x"})
    whole = ViewConfig(crop_scale=(1, 1), crop_ratio=(1, 1))
    views = {"small": View(whole, 64, mode="fast"), "large": View(whole, 200, mode="fast")}
    Renderer(views, ["{txt}"], 0)([large], epoch=0)
    Renderer({"small": views["small"]}, ["{txt}"], 0)([large], epoch=0)
    assert reductions == [2, 8]


def test_bad_samples_are_listed() -> None:
    """Broken images, missing fields and empty captions are listed with row and reason."""
    good = samples()
    broken = list(good)
    broken[1] = Sample(1, "a.tar", "1", good[1].image[:200], {"txt": "x"})
    broken[3] = Sample(3, "a.tar", "3", good[3].image, {"note": "x"})
    broken[4] = Sample(4, "a.tar", "4", good[4].image, {"txt": " \n", "tags": []})
    only_text = Renderer(renderer().views, ["{txt}"], 0)
    rendered, expected = only_text(broken, epoch=0), only_text(good, epoch=0)
    assert [row for row, _ in rendered.bad] == [1, 3, 4]
    for (_, reason), word in zip(rendered.bad, ("broken or cut", "'txt'; the sample has: note", "empty"), strict=True):
        assert word in reason
        assert "\n" not in reason
    for row in range(7):
        bad = row in (1, 3, 4)
        assert rendered.texts[row] == ("" if bad else expected.texts[row])
        for name, view in rendered.views.items():
            assert (view[row] == 0).all() if bad else torch.equal(view[row], expected.views[name][row])


def test_pixel_cap_of_the_views() -> None:
    """An image above the cap is a bad sample."""
    capped = Renderer({"main": View(ViewConfig(), 16, max_pixels=1000)}, ["{txt}"], 0)
    assert "data.max_pixels" in capped(samples(1), epoch=0).bad[0][1]


@pytest.mark.parametrize("templates", [["{txt}"], ["{txt}", "a drawing of {txt}"], ["{tags}"]])
def test_captions_are_drawn_by_seed_epoch_and_sample(templates: list[str]) -> None:
    """Also where the renderer sees that nothing is to be drawn, the text is the one that the generator gives."""
    some = [Sample(i, "s", str(i), b"", {"txt": f"text {i}", "tags": ["a", "b", "c"][: i % 4]}) for i in range(1, 20)]
    others: list[dict[str, str]] = [{}, {"tags": "none"}]
    for fields in others:
        given = [replace(sample, fields={**sample.fields, **fields}) for sample in some]
        texts = Renderer({}, templates, seed=3)(given, epoch=2).texts
        rngs = [generator(3, "caption", 2, sample.id) for sample in given]
        expected = [render_caption(s.fields, templates, rng) for s, rng in zip(given, rngs, strict=True)]
        assert texts == expected


def test_malformed_templates_are_refused_at_once() -> None:
    """A template that can never work is refused when the renderer is made."""
    with pytest.raises(UserError, match="malformed"):
        Renderer({}, ["{txt}", "{a.b}"], 0)


@pytest.mark.parametrize("fields", [{"txt": "one\ntwo\nthree\n"}, {"txt": "one", "captions": ["one", "two", "three"]}])
def test_an_epoch_draws_one_of_several_captions(fields: dict[str, Any]) -> None:
    """Over the epochs a sample gives each of its captions, one at a time, and the same again for the same epoch."""
    renderer = Renderer({}, ["{txt}"], seed=3)
    sample = Sample(7, "a.tar", "key", b"", fields)
    texts = [renderer([sample], epoch).texts[0] for epoch in range(40)]
    assert set(texts) == {"one", "two", "three"}
    assert texts[:5] == [renderer([sample], epoch).texts[0] for epoch in range(5)]


def test_groups_have_the_numbers_of_their_values() -> None:
    """Samples with one caption, or one value of a field, share a number, whatever its type and order of keys; a sample
    without a value is alone. Numbers are the same in every process: two are written down here."""
    values: list[Any] = ["a", "a", 3, 3.0, {"x": 1, "y": 2}, {"y": 2, "x": 1}, "3", None, None, "", float("nan"), [], 0]
    image = encode(photo(8, 8), "PNG")
    given = [Sample(i, "a.tar", str(i), image, {"txt": f"word  {i % 2}", "kind": v}) for i, v in enumerate(values)]
    given.append(Sample(99, "a.tar", "99", image, {"txt": "word &amp; 0"}))
    found = Renderer({}, ["{txt}"], 0, groups=["kind", "caption"])(given, epoch=0).groups
    kinds = found["kind"].tolist()
    alike = [{0, 1}, {2, 3}, {4, 5}]
    for i in range(len(given)):
        partners = {j for j, number in enumerate(kinds) if number == kinds[i]}
        assert partners == next((pair for pair in alike if i in pair), {i}), i
    captions = found["caption"].tolist()
    assert captions[:13] == [captions[0], captions[1]] * 6 + [captions[0]]
    assert len(set(captions)) == 3
    assert (kinds[0], captions[0]) == (6800671158684483484, 8000105346553975115)
