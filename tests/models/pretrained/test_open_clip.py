"""Models of open_clip and transformers, loaded here, give their own libraries' features."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image

import mmssl
from mmssl.build import RunPlan, build_encoder, build_tokenizer, complete_config
from mmssl.config import VisionConfig, dump_config, load_config, parse_config
from mmssl.data.transforms import load_tokenizer
from mmssl.errors import UserError
from mmssl.models.vision_factory import build_vision
from tests.helpers.open_clip_folders import MODELS, PREPROCESSING, TEXTS, write_open_clip


def image(width: int = 90, height: int = 70) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def agree(ours: mmssl.Model, theirs: Any, side: int, tolerance: float = 1e-6) -> None:
    """Features of captions and of an image of the model's own size."""
    length = getattr(theirs, "context_length", 77)
    with torch.no_grad():
        expected = theirs.encode_text(open_clip.get_tokenizer("ViT-B-32", context_length=length)(TEXTS), normalize=True)
        torch.testing.assert_close(ours.encode_text(TEXTS), expected, atol=tolerance, rtol=0)
        pixels = ours.render(image(side, side))[None]
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ours.vision.statistics)
        expected = theirs.encode_image((pixels / 255 - mean) / std, normalize=True)
        torch.testing.assert_close(ours.encode_rendered(pixels), expected, atol=tolerance, rtol=0)
    assert ours.logit_scale == pytest.approx(float(theirs.logit_scale.detach().exp()), rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_an_open_clip_folder_gives_open_clips_features(name: str, tmp_path: Path) -> None:
    """Any architecture, with the text tower, temperature and preprocessing of its folder; saved as our own, it stays
    the same to the last bit."""
    theirs = write_open_clip(tmp_path / "theirs", name)
    side = theirs.visual.image_size if isinstance(theirs.visual.image_size, int) else theirs.visual.image_size[0]
    ours = mmssl.load(f"local-dir:{tmp_path / 'theirs'}")
    agree(ours, theirs, side)
    assert ours.config.vision.mean == tuple(PREPROCESSING["mean"])
    assert ours.view.fit == "squash"
    assert ours.view.interpolation == "bilinear"
    assert f"{len(theirs.state_dict())} weights" in ours.notes[0]
    ours.save(tmp_path / "ours")
    again = mmssl.load(tmp_path / "ours")
    assert torch.equal(again.encode_text(TEXTS), ours.encode_text(TEXTS))
    assert torch.equal(again.encode_image(image()), ours.encode_image(image()))
    assert mmssl.load(tmp_path / "theirs").notes[1:] == ours.notes[1:]


def test_captions_without_punctuation_are_open_clips() -> None:
    """Tokens of captions in SigLIP's canonical form are those of open_clip's own clean-up."""
    plain, canonical = load_tokenizer("clip", 77), load_tokenizer("clip", 77)
    canonical.drop_punctuation()
    clean = open_clip.tokenizer.canonicalize_text
    texts = [*(text for text in TEXTS if "&amp;" not in text), "snake_case, (brackets) [x]^2 - it's  \\ / ~done!"]
    assert torch.equal(canonical.encode(texts)[0], plain.encode([clean(text) for text in texts])[0])


LARGEST = 600_000_000
"""Parameters of the largest architecture that is tried."""


def offline(name: str) -> bool:
    """True if an architecture needs no file of a hub: its captions are CLIP's tokens."""
    text = open_clip.get_model_config(name)["text_cfg"]
    return not any(key in text for key in ("hf_model_name", "hf_tokenizer_name")) and "coca" not in name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in open_clip.list_models() if offline(name)])
def test_a_named_architecture_with_a_file_of_weights(name: str, tmp_path: Path) -> None:
    """open_clip:MODEL/FILE gives the features of open_clip's model with that file, for every architecture up to LARGEST
    that needs no hub."""
    with torch.device("meta"):
        size = sum(p.numel() for p in open_clip.create_model(name, device="meta").parameters())
    if size > LARGEST:
        pytest.skip(f"needs memory for {size / 1e6:.0f} M weights")
    torch.manual_seed(0)
    theirs = open_clip.create_model(name).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    ours = mmssl.load(f"open_clip:{name}/{tmp_path / 'w.pt'}")
    side = theirs.visual.image_size if isinstance(theirs.visual.image_size, int) else theirs.visual.image_size[0]
    agree(ours, theirs, side, tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "RN50"])
def test_images_are_prepared_as_open_clip_does(name: str, tmp_path: Path) -> None:
    """An image file's features are those of open_clip's model behind open_clip's transform."""
    torch.manual_seed(0)
    theirs = open_clip.create_model(name).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    ours = mmssl.load(f"open_clip:{name}/{tmp_path / 'w.pt'}")
    with torch.no_grad():
        prepared = open_clip.image_transform(224, is_train=False)(image(224, 224))[None]
        expected = theirs.encode_image(prepared, normalize=True)
    torch.testing.assert_close(ours.encode_image(image(224, 224)), expected, atol=1e-6, rtol=0)


def test_a_transformers_clip_gives_transformers_features(tmp_path: Path) -> None:
    """CLIPModel's folder: features, temperature and preprocessing; and through our own folder again."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=dict(sizes), vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=24
    )
    theirs = transformers.CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path)
    load_tokenizer("clip", 77).save(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 32, "resample": 3, '
        '"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}'
    )
    ours = mmssl.load(tmp_path)
    assert ours.vision.statistics == ((0.5,) * 3, (0.25,) * 3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [text for text in TEXTS if "&amp;" not in text]
    words = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    pixels = ours.render(image(32, 32))[None]
    with torch.no_grad():
        ids = {name: words[name] for name in ("input_ids", "attention_mask")}
        output = theirs(**ids, pixel_values=(pixels / 255 - 0.5) / 0.25)
    torch.testing.assert_close(ours.encode_text(texts), output.text_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.encode_rendered(pixels), output.image_embeds, atol=1e-6, rtol=0)
    ours.save(tmp_path / "ours")
    assert torch.equal(mmssl.load(tmp_path / "ours").encode_text(TEXTS), ours.encode_text(TEXTS))


def test_a_transformers_siglip_gives_transformers_features(tmp_path: Path) -> None:
    """SiglipModel's folder: captions padded to the full length and seen with their padding, as it was trained."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 49408, "max_position_embeddings": 16, "projection_size": 32, "pad_token_id": 7}
    config = transformers.SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8})
    theirs = transformers.SiglipModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path)
    tokenizer = load_tokenizer("clip", 16)
    tokenizer.save(tmp_path)
    ours = mmssl.load(tmp_path)
    pixels = ours.render(image(32, 32))[None]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ours.vision.statistics)
    ids, mask = tokenizer.encode(TEXTS)
    ids = torch.nn.functional.pad(ids, (0, 16 - ids.shape[1])).masked_fill(
        torch.nn.functional.pad(mask, (0, 16 - mask.shape[1])) == 0, tokenizer.pad_id
    )
    with torch.no_grad():
        output = theirs(input_ids=ids, pixel_values=(pixels / 255 - mean) / std)
    torch.testing.assert_close(ours.encode_text(TEXTS), output.text_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.encode_rendered(pixels), output.image_embeds, atol=1e-6, rtol=0)
    ours.save(tmp_path / "ours")
    again = mmssl.load(tmp_path / "ours")
    assert torch.equal(again.encode_text(TEXTS), ours.encode_text(TEXTS))
    assert torch.equal(again.encode_rendered(pixels), ours.encode_rendered(pixels))


def test_a_vision_text_dual_encoder_gives_transformers_features(tmp_path: Path) -> None:
    """CLIP's vision tower with a BERT, whose own pooler makes the caption's vector."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8))
    text = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=49408))
    theirs = transformers.VisionTextDualEncoderModel(vision_model=vision, text_model=text).eval()
    theirs.save_pretrained(tmp_path)
    load_tokenizer("clip", 77).save(tmp_path)
    ours = mmssl.load(tmp_path)
    ids, mask = ours.tokenizer.encode(TEXTS)
    pixels = ours.render(image(32, 32))[None]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ours.vision.statistics)
    with torch.no_grad():
        output = theirs(input_ids=ids, attention_mask=mask.long(), pixel_values=(pixels / 255 - mean) / std)
    torch.testing.assert_close(ours.encode_text(TEXTS), output.text_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.encode_rendered(pixels), output.image_embeds, atol=1e-6, rtol=0)
    ours.save(tmp_path / "ours")
    assert torch.equal(mmssl.load(tmp_path / "ours").encode_text(TEXTS), ours.encode_text(TEXTS))


def test_training_starts_from_a_whole_model(tmp_path: Path) -> None:
    """model.start brings towers, weights, tokenizer and preprocessing, and the resolved configuration says so; what was
    taken over is told; towers can be locked but not changed."""
    write_open_clip(tmp_path / "theirs", "vit")
    source = f"local-dir:{tmp_path / 'theirs'}"
    tree = {"run_dir": str(tmp_path / "run"), "data": {"train": "x.tar"}, "train": {"steps": 1}}
    config = parse_config({**tree, "model": {"start": source, "vision": {"lock": True}}}, "here")
    full, objectives = complete_config(config)
    assert full.model.vision.lock
    assert full.model.vision.image_size == 32
    assert full.model.text.tokenizer == "clip"
    told: list[str] = []
    encoder = build_encoder(full, build_tokenizer(RunPlan(full, [], objectives, {}), tmp_path / "none"), told.append)
    assert any(f"{len(encoder.state_dict())} weights" in line for line in told), told
    wanted = mmssl.load(source).encoder.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in encoder.state_dict().items())
    assert not any(p.requires_grad for p in encoder.vision.parameters())
    (tmp_path / "config.yaml").write_text(dump_config(full))
    assert complete_config(load_config(tmp_path / "config.yaml"))[0] == full
    changed = parse_config({**tree, "model": {"start": source, "vision": {"image_size": 64}}}, "here")
    with pytest.raises(UserError, match="model.vision.image_size"):
        complete_config(changed)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("open_clip:ViT-B-33", "ViT-B-32"),
        ("open_clip:ViT-B-32/no-such-tag", "no-such-tag"),
        ("local-dir:/nowhere", "nowhere"),
        ("transformers:/nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_had_is_named(source: str, words: str) -> None:
    """One line for a user."""
    with pytest.raises(UserError, match=words) as caught:
        mmssl.load(source)
    assert "\n" not in str(caught.value)


def hub_cache(folder: Path, repository: str, source: Path) -> None:
    """The files of a folder as the hub's cache keeps those of a repository."""
    place = folder / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    shutil.copytree(source, place / "snapshots" / "abc")


@pytest.mark.parametrize("name", ["vit", "timm-head"])
def test_an_open_clip_model_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip:hf-hub:USER/MODEL gives open_clip's features, and saved as our own needs the hub no more; without
    weights it is refused."""
    theirs = write_open_clip(tmp_path / "theirs", name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_cache(tmp_path / "hub", "user/model", tmp_path / "theirs")
    ours = mmssl.load("open_clip:hf-hub:user/model")
    agree(ours, theirs, 32 if name == "vit" else 64)
    ours.save(tmp_path / "ours")
    (tmp_path / "theirs" / "open_clip_model.safetensors").unlink()
    hub_cache(tmp_path / "hub", "user/bare", tmp_path / "theirs")
    for missing in ("user/bare", "user/none"):
        with pytest.raises(UserError, match=f"hf-hub:{missing}"):
            mmssl.load(f"open_clip:hf-hub:{missing}")
    shutil.rmtree(tmp_path / "hub")
    assert torch.equal(mmssl.load(tmp_path / "ours").encode_text(TEXTS), ours.encode_text(TEXTS))


@pytest.mark.parametrize(("name", "tag"), [("ViT-B-32", "openai"), ("ViT-L-14", "dfn2b"), ("RN50", "openai")])
def test_weights_trained_with_another_activation_are_refused(name: str, tag: str) -> None:
    """Before anything is loaded, with the name of the architecture that fits, as whole model and as vision tower."""
    words = f"trained with QuickGELU.*use {name}-quickgelu"
    with pytest.raises(UserError, match=words):
        mmssl.load(f"open_clip:{name}/{tag}")
    with pytest.raises(UserError, match=words):
        build_vision(VisionConfig(name=f"open_clip:{name}", pretrained=tag), 512)


def clip_folder(folder: Path, processor: dict[str, Any]) -> Any:
    """A tiny CLIPModel of transformers for 32 pixels with this image processor."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=dict(sizes), vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=24
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(folder)
    load_tokenizer("clip", 77).save(folder)
    given = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps({**given, **processor}))
    return model


@pytest.mark.parametrize(
    "processor",
    [
        {},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 50.0, 40.0]},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 100, "do_normalize": False},
        {"crop_size": {"height": 32, "width": 32}, "resample": 2},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
    ],
)
def test_an_image_processor_is_honoured(processor: dict[str, Any], tmp_path: Path) -> None:
    """Images of the model's size through transformers' own processor and model, against ours, to 1e-4."""
    theirs = clip_folder(tmp_path, processor)
    ours = mmssl.load(tmp_path)
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path)(image(32, 32), return_tensors="pt")
    with torch.no_grad():
        expected = theirs.get_image_features(**pixels)
        expected = getattr(expected, "pooler_output", expected)
    torch.testing.assert_close(
        ours.encode_image(image(32, 32)), torch.nn.functional.normalize(expected, dim=-1), atol=1e-4, rtol=0
    )
    assert ours.view.fit == ("squash" if "height" in processor.get("size", {}) else "shortest")


@pytest.mark.parametrize(
    ("processor", "words"),
    [
        ({"crop_size": 24}, "crops to .*24"),
        ({"crop_size": {"height": 32, "width": 24}}, "crops to .*24"),
        ({"size": {"shortest_edge": 40}}, "resizes to .*40"),
        ({"size": {"height": 32, "width": 48}}, "resizes to .*48"),
        ({"do_resize": False}, "does not resize"),
        ({"do_center_crop": False}, "not square"),
        ({"resample": 1}, "filter 1"),
    ],
)
def test_an_image_processor_that_differs_is_refused(processor: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Sizes other than the model's, steps that are left out and filters that we do not have, by name."""
    clip_folder(tmp_path, processor)
    with pytest.raises(UserError, match=words):
        mmssl.load(tmp_path)
