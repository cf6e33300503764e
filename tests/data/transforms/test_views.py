"""Views against Pillow's full decode and resize, torchvision's crops, and their own promises."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from mmssl.config import ViewConfig
from mmssl.data.transforms.augment_params import draw_params
from mmssl.data.transforms.caps import DecodeError
from mmssl.data.transforms.decoding import Header, decode, read_header
from mmssl.data.transforms.views import EvalView, View, as_pixels
from tests.helpers.images import encode, mean_difference, orientation, photo, psnr

PLAIN = ViewConfig(crop_scale=(0.3, 1.0))
OPERATIONS = (
    "flip",
    "affine",
    "color_jitter",
    "gray",
    "invert",
    "solarize",
    "posterize",
    "outline",
    "blur",
    "erase",
)


def rng(seed: int = 0) -> np.random.Generator:
    """A generator of the test's own."""
    return np.random.default_rng(seed)


def reference(image: bytes, view: View, seed: int) -> np.ndarray:
    """The same crop by Pillow: full decode, crop, antialiased bicubic resize."""
    header = read_header(image)
    crop = view.crop(header, draw_params(rng(seed)))
    crop = crop.on_grid(view.reduction(header, crop), header)
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    with Image.open(io.BytesIO(image)) as opened:
        side = view.image_size
        return np.asarray(opened.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, box=box))


@pytest.mark.parametrize("size", [48, 64, 224])
@pytest.mark.parametrize("seed", range(3))
def test_quality_mode_equals_pillow(size: int, seed: int) -> None:
    """Quality mode differs from Pillow's full decode, crop and resize by at most 1/255 on average."""
    view = View(PLAIN, size)
    image = encode(photo(512, 512), "JPEG", quality=90)
    ours = view(image, rng(seed)).permute(1, 2, 0).numpy()
    assert mean_difference(ours, reference(image, view, seed)) < 1
    assert psnr(ours, reference(image, view, seed)) > 40


@pytest.mark.parametrize("seed", range(5))
def test_fast_mode_stays_near(seed: int) -> None:
    """Fast mode decodes at a reduced size and stays above 28 dB."""
    view = View(ViewConfig(), 112, mode="fast")
    image = encode(photo(512, 512), "JPEG", quality=90)
    header = read_header(image)
    assert view.reduction(header, view.crop(header, draw_params(rng(seed)))) == 4
    ours = view(image, rng(seed)).permute(1, 2, 0).numpy()
    assert psnr(ours, reference(image, view, seed)) > 28


@pytest.mark.parametrize(
    ("side", "mode", "expected"),
    [
        (167, "fast", 1),
        (336, "fast", 2),
        (335, "fast", 1),
        (671, "fast", 2),
        (672, "fast", 4),
        (1344, "fast", 8),
        (895, "quality", 1),
        (896, "quality", 2),
        (9000, "quality", 2),
    ],
)
def test_reduction_leaves_enough_pixels(side: int, mode: str, expected: int) -> None:
    """For 224 px: fast mode keeps 168 px of a crop or more; quality mode only halves, and keeps 448 px."""
    view = View(ViewConfig(crop_scale=(1, 1), crop_ratio=(1, 1)), 224, mode=mode)  # type: ignore[arg-type]
    header = Header("JPEG", side, side, reducible=True)
    assert view.reduction(header, view.crop(header, draw_params(rng()))) == expected
    assert view.reduction(Header("PNG", side, side), view.crop(header, draw_params(rng()))) == 1


def test_reduction_looks_at_the_shorter_side() -> None:
    """A crop that is long and thin is not decoded below what its thin side needs."""
    view = View(ViewConfig(crop_scale=(1, 1), crop_ratio=(0.1, 10)), 100, mode="fast")
    header = Header("JPEG", 1000, 150, reducible=True)
    crop = view.crop(header, draw_params(rng()))
    assert view.reduction(header, crop) == (2 if crop.height >= 150 else 1)


@pytest.mark.parametrize(("width", "height"), [(640, 480), (100, 400), (64, 64)])
def test_crops_are_distributed_like_torchvisions(width: int, height: int) -> None:
    """Area, shape and place of 2,000 crops have torchvision's means and quartiles."""
    config = ViewConfig(crop_scale=(0.2, 1.0), crop_ratio=(0.75, 4 / 3))
    view, numbers = View(config, 32), rng(7)
    ours = np.array([view.crop(Header("PNG", width, height), draw_params(numbers)) for _ in range(2000)], float)
    theirs_of = v2.RandomResizedCrop(32, scale=config.crop_scale, ratio=config.crop_ratio).make_params
    canvas = torch.empty(3, height, width)
    torch.manual_seed(0)
    drawn = [theirs_of([canvas]) for _ in range(2000)]
    theirs = np.array([[crop[k] for k in ("top", "left", "height", "width")] for crop in drawn], float)

    def summary(crops: np.ndarray) -> np.ndarray:
        area, shape = crops[:, 2] * crops[:, 3] / (width * height), np.log(crops[:, 3] / crops[:, 2])
        columns = np.stack([area, shape, crops[:, 0] / height, crops[:, 1] / width], 1)
        return np.concatenate([columns.mean(0), np.quantile(columns, [0.25, 0.5, 0.75], axis=0).ravel()])

    np.testing.assert_allclose(summary(ours), summary(theirs), atol=0.035)


def test_crops_lie_inside() -> None:
    """Every crop lies in the image, for sizes down to one pixel and shapes that no attempt can meet."""
    view, numbers = View(ViewConfig(crop_scale=(0.5, 1.0)), 16), rng()
    for width, height in ((1, 1), (1, 500), (500, 1), (3, 2), (4000, 10), (16, 16)):
        for _ in range(100):
            crop = view.crop(Header("PNG", width, height), draw_params(numbers))
            assert 0 <= crop.top < crop.top + crop.height <= height
            assert 0 <= crop.left < crop.left + crop.width <= width


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (7, 5)])
def test_tiny_and_thin_images_render(size: tuple[int, int]) -> None:
    """Images of a few pixels come out at full size; a flat one stays flat."""
    image = encode(Image.new("RGB", size, (10, 200, 30)), "PNG")
    for rendered in (
        View(ViewConfig(), 32)(image, rng()),
        EvalView(32)(image),
        EvalView(32, "squash")(image),
    ):
        assert rendered.shape == (3, 32, 32)
        assert (rendered == torch.tensor([10, 200, 30])[:, None, None]).all()


def test_the_same_generator_gives_the_same_image() -> None:
    """A rendering is a pure function of image, configuration and generator; other seeds differ."""
    view = View(ViewConfig(**dict.fromkeys(OPERATIONS, 0.5)), 64)
    image = encode(photo(), "JPEG")
    for seed in range(20):
        first = view(image, rng(seed))
        assert (first.dtype, first.shape, first.is_contiguous()) == (torch.uint8, (3, 64, 64), True)
        assert torch.equal(first, view(image, rng(seed)))
        assert not torch.equal(first, view(image, rng(seed + 1)))


def test_operations_do_not_move_each_other() -> None:
    """Turning an operation on changes neither the crop nor the other operations' numbers."""
    image = encode(photo(), "PNG")
    for seed in range(10):
        plain = View(PLAIN, 48)(image, rng(seed))
        flipped = View(PLAIN.model_copy(update={"flip": 1.0}), 48)(image, rng(seed))
        inverted = View(PLAIN.model_copy(update={"invert": 1.0}), 48)(image, rng(seed))
        assert torch.equal(flipped.flip(-1), plain)
        assert torch.equal(255 - inverted, plain)


def test_probabilities_are_met() -> None:
    """Each operation happens in its share of the renderings; `augment` thins out all but the flip."""
    image = encode(photo(32, 32), "PNG")
    plain = ViewConfig(crop_scale=(1, 1), crop_ratio=(1, 1))
    original = View(plain, 32)(image, rng())
    for name in set(OPERATIONS) - {"blur"}:
        for share in (1.0, 0.5):
            view = View(plain.model_copy(update={name: 0.4, "augment": share}), 32)
            changed = sum(not torch.equal(view(image, rng(seed)), original) for seed in range(200))
            expected = 0.4 if name == "flip" else 0.4 * share
            assert abs(changed / 200 - expected) < 0.1, (name, share)


def test_blur_happens_at_its_share() -> None:
    """At 96 px most of the drawn blurs are strong enough to be seen."""
    image = encode(photo(96, 96), "PNG")
    plain = ViewConfig(crop_scale=(1, 1), crop_ratio=(1, 1))
    original = View(plain, 96)(image, rng())
    view = View(plain.model_copy(update={"blur": 0.4}), 96)
    changed = sum(not torch.equal(view(image, rng(seed)), original) for seed in range(200))
    assert 0.25 < changed / 200 < 0.5


def test_crop_of_a_turned_jpeg() -> None:
    """Crops refer to the upright image: a JPEG stored on its side renders as the upright one does."""
    turned = photo(320, 200).transpose(Image.Transpose.ROTATE_90)
    upright, sideways = encode(photo(320, 200), "PNG"), encode(turned, "PNG", exif=orientation(6))
    view = View(PLAIN, 40)
    for seed in range(5):
        assert torch.equal(view(upright, rng(seed)), view(sideways, rng(seed)))


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (301, 300), (33, 500), (64, 64)])
def test_eval_view_equals_torchvision(height: int, width: int) -> None:
    """`shortest` is OpenCLIP's transform, torchvision's Resize and CenterCrop, to the rounding."""
    image = photo(height, width)
    transform = v2.Compose([v2.Resize(64, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(64)])
    expected = np.asarray(transform(image))
    ours = EvalView(64)(encode(image, "PNG")).permute(1, 2, 0).numpy()
    assert np.abs(ours.astype(int) - expected).max() <= 2
    assert mean_difference(ours, expected) < 0.3


def test_a_line_is_seen_as_its_middle() -> None:
    """An image 300 times as wide as high, or as high as wide, is seen as the middle part of 20 to 1."""
    line = np.random.default_rng(0).integers(0, 256, (10, 3000, 3), np.uint8)
    for array, middle in ((line, line[:, 1400:1600]), (line.transpose(1, 0, 2), line.transpose(1, 0, 2)[1400:1600])):
        assert torch.equal(EvalView(16)(array.copy()), EvalView(16)(middle.copy()))


def test_squash_keeps_everything() -> None:
    """`squash` resizes both sides, as Pillow does."""
    image = photo(300, 400)
    ours = EvalView(64, "squash")(encode(image, "PNG")).permute(1, 2, 0).numpy()
    assert mean_difference(ours, np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))) < 0.3


def test_eval_view_takes_decoded_images() -> None:
    """Encoded bytes, a Pillow image, an array and a tensor of one image give the same result."""
    image = photo(300, 400)
    array = np.asarray(image)
    expected = EvalView(48)(encode(image, "PNG"))
    for form in (image, array.copy(), torch.from_numpy(array.copy()).permute(2, 0, 1)):
        assert torch.equal(EvalView(48)(form), expected)
    gray = np.array(image.convert("L"))
    assert torch.equal(EvalView(48)(gray), EvalView(48)(image.convert("L")))


def test_floats_from_0_to_1_are_pixels() -> None:
    """What torchvision's ToTensor makes of an image, in any float type, is that image; one channel is gray."""
    array = np.asarray(photo(60, 50))
    expected = EvalView(48)(array.copy())
    unit = torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255
    for form in (unit, unit.double(), unit.permute(1, 2, 0).numpy()):
        assert torch.equal(EvalView(48)(form), expected)
    assert torch.equal(EvalView(48)(unit[:1]), EvalView(48)(array[:, :, 0].copy()))


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_pillow_image_is_turned_as_its_file(value: int, format: str) -> None:
    """Whatever orientation EXIF gives, an opened file is seen as its bytes are, before and after Pillow loads it."""
    content = encode(photo(60, 50), format, exif=orientation(value))
    expected = as_pixels(Image.fromarray(decode(content)))
    assert np.array_equal(as_pixels(Image.open(io.BytesIO(content))), expected)
    loaded = Image.open(io.BytesIO(content))
    loaded.load()
    assert np.array_equal(as_pixels(loaded), expected)
    assert expected.shape[:2] == ((50, 60) if value >= 5 else (60, 50))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.full((8, 8, 3), 255.0), r"floats from 0 to 1 before normalisation; found float64 \[8, 8, 3\] from 255 to"),
        (np.full((8, 8, 3), np.nan), "floats from 0 to 1"),
        (torch.linspace(-2, 2, 192).view(3, 8, 8), r"found torch.float32 \[3, 8, 8\] from -2 to 2"),
        (np.zeros((8, 8, 3), np.int64), "found int64"),
        (np.zeros((8, 8, 4), np.uint8), r"expected an array \[H, W, 3\] .* found uint8 \[8, 8, 4\]"),
        (np.zeros((0, 8, 3), np.uint8), r"found uint8 \[0, 8, 3\]"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"expected a tensor \[3, H, W\], found torch.uint8 \[8, 8, 3\]"),
        (Image.open(io.BytesIO(encode(photo(60, 50), "PNG")[:900])), "broken or cut"),
    ],
)
def test_other_pixels_are_refused(image: np.ndarray | torch.Tensor | Image.Image, words: str) -> None:
    """Pixels of another type, range or layout, and files that Pillow opened but cannot read, say what is wanted and
    what was found."""
    with pytest.raises(DecodeError, match=words):
        EvalView(8)(image)


@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_eval_view_fast_mode(resize: str) -> None:
    """Fast mode of the evaluation view has the same geometry and stays near quality mode."""
    image = encode(photo(500, 400), "JPEG", quality=90)
    quality = EvalView(100, resize)(image)  # type: ignore[arg-type]
    fast = EvalView(100, resize, mode="fast")(image)  # type: ignore[arg-type]
    assert 27 < psnr(fast.numpy(), quality.numpy()) < 60
