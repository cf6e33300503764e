"""Exported files load in the library they are for, and give the same features there."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import open_clip
import pytest
import sentence_transformers
import timm
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError

import mmssl
from mmssl import MMSSL
from mmssl.apps.export import OnnxEncoder, export, find_format, format_names, push, shrink
from mmssl.apps.finetune import Classifier, load_classifier
from mmssl.cli import main
from mmssl.config import dump_config, parse_config
from mmssl.errors import UserError
from mmssl.evaluate import datasets, open_dataset
from mmssl.rng import torch_generator
from tests.helpers.export_models import own, some_calibration
from tests.helpers.images import photo
from tests.helpers.open_clip_folders import MODELS, write_open_clip
from tests.helpers.tiny_runs import COLORS, run_tree, write_pairs

CAPTIONS = ["a red square", "a woman’s “green”", "blue squares and a white one " * 8]


def image(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> mmssl.Model:
    """A small model of CLIP's form, taken over from open_clip."""
    folder = tmp_path_factory.mktemp("theirs")
    write_open_clip(folder, "vit-quickgelu")
    return mmssl.load(f"local-dir:{folder}")


def close(found: Any, expected: torch.Tensor) -> None:
    unit = torch.nn.functional.normalize(torch.as_tensor(found).detach(), dim=-1)
    torch.testing.assert_close(unit, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_an_open_clip_model_goes_back_as_the_same_tensors(name: str, tmp_path: Path) -> None:
    """Taken over and exported again, every tensor of the folder is the one that was there, under its name."""
    theirs = write_open_clip(tmp_path / "theirs", name).state_dict()
    export(mmssl.load(f"local-dir:{tmp_path / 'theirs'}"), "open_clip", tmp_path / "back")
    back = open_clip.create_model(f"local-dir:{tmp_path / 'back'}").state_dict()
    assert back.keys() == theirs.keys()
    assert [key for key, tensor in theirs.items() if not torch.equal(tensor, back[key])] == []


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50"])
def test_a_full_open_clip_model_goes_back_as_the_same_tensors(name: str, tmp_path: Path) -> None:
    """The same at full size, from a named architecture with a file of weights."""
    torch.manual_seed(0)
    theirs = open_clip.create_model(name).state_dict()
    torch.save(theirs, tmp_path / "w.pt")
    export(mmssl.load(f"open_clip:{name}/{tmp_path / 'w.pt'}"), "open_clip", tmp_path / "back")
    back = open_clip.create_model(f"local-dir:{tmp_path / 'back'}").state_dict()
    assert back.keys() == theirs.keys()
    assert [key for key, tensor in theirs.items() if not torch.equal(tensor, back[key])] == []


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_open_clip_opens_a_resnet_and_a_bert(pooling: str, tmp_path: Path) -> None:
    """open_clip's loader, transform and tokenizer give our features; so does the folder loaded here again."""
    model = own(pooling)
    found = export(model, "open_clip", tmp_path / "out")
    assert found.difference <= 1e-5
    theirs, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    with torch.no_grad():
        close(theirs.eval().encode_text(tokenizer(CAPTIONS)), model.encode_text(CAPTIONS))
        close(theirs.encode_image(transform(image(32))[None]), model.encode_image(image(32)))
    again = mmssl.load(tmp_path / "out")
    close(again.encode_text(CAPTIONS), model.encode_text(CAPTIONS))
    close(again.encode_image(image(32)), model.encode_image(image(32)))


def test_transformers_opens_a_clip(clip: mmssl.Model, tmp_path: Path) -> None:
    """AutoModel with AutoTokenizer and AutoImageProcessor; and the folder loaded here again."""
    export(clip, "transformers", tmp_path / "out")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    words = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    pixels = processor(image(32), return_tensors="pt")["pixel_values"]
    ids = {name: words[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        output = theirs(**ids, pixel_values=pixels)
    close(output.text_embeds, clip.encode_text(CAPTIONS))
    close(output.image_embeds, clip.encode_image(image(32)))
    again = mmssl.load(tmp_path / "out")
    close(again.encode_text(CAPTIONS), clip.encode_text(CAPTIONS))
    close(again.encode_image(image(32)), clip.encode_image(image(32)))
    assert again.view.fit == "squash"
    export(again, "open_clip", tmp_path / "back")


@pytest.mark.parametrize(("pooling", "projection"), [("mean", "linear"), ("cls", "mlp"), ("eos", "linear")])
def test_sentence_transformers_opens_a_text_tower(pooling: str, projection: str, tmp_path: Path) -> None:
    """Encoder, pooling, projection and norm as modules of SentenceTransformer."""
    model = own(pooling, projection)
    export(model, "sentence-transformers", tmp_path / "out")
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    close(theirs.encode(CAPTIONS, show_progress_bar=False), model.encode_text(CAPTIONS))


def test_sentence_transformers_opens_clips_text_tower(clip: mmssl.Model, tmp_path: Path) -> None:
    """open_clip's text transformer becomes transformers' one."""
    export(clip, "sentence-transformers", tmp_path / "out")
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    close(theirs.encode(CAPTIONS, show_progress_bar=False), clip.encode_text(CAPTIONS))


@pytest.mark.parametrize("kind", ["own", "own mlp", "own vit", "clip"])
def test_sentence_transformers_encodes_images_too(kind: str, clip: mmssl.Model, tmp_path: Path) -> None:
    """Images and texts in one model: images of the model's size have our features to 1e-5; a larger photo, which the
    library scales itself, to a cosine of 0.999."""
    model = {
        "own": own,
        "own mlp": lambda: own(projection="mlp"),
        "own vit": lambda: own(vision="timm:vit_tiny_patch16_224"),
        "clip": lambda: clip,
    }[kind]()
    export(model, "sentence-transformers", tmp_path / "out")
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    seen = [image(model.vision.image_size), photo(90, 60)]
    found = theirs.encode(seen, show_progress_bar=False)
    expected = model.encode_image(seen)
    close(found[0], expected[0])
    assert float(torch.as_tensor(found[1]) @ expected[1]) > 0.999
    close(theirs.encode(CAPTIONS, show_progress_bar=False), model.encode_text(CAPTIONS))


def test_transformers_pipeline_gives_our_probabilities(clip: mmssl.Model, tmp_path: Path) -> None:
    """`pipeline("zero-shot-image-classification")` on the exported folder has the probabilities of `classify`, in its
    order."""
    export(clip, "transformers", tmp_path / "out")
    ask = transformers.pipeline("zero-shot-image-classification", model=str(tmp_path / "out"), device="cpu")
    labels = ["red", "a green square", "blue"]
    found = ask(image(32), candidate_labels=labels, hypothesis_template="a photo of {}")
    expected = clip.classify(image(32), labels, "a photo of {c}")
    assert [entry["label"] for entry in found] == list(expected)
    assert [entry["score"] for entry in found] == pytest.approx(list(expected.values()), abs=1e-5)


@pytest.mark.parametrize(
    "model", [own, lambda: own("cls", "mlp"), lambda: own("eos", vision="timm:vit_tiny_patch16_224")]
)
def test_transformers_opens_towers_that_it_has_no_class_for(model: Any, tmp_path: Path) -> None:
    """timm's vision towers with a BERT, every pooling and projection: AutoModel and AutoProcessor give our features and
    the zero-shot pipeline our probabilities; without trust in the code in the folder, nothing is opened."""
    ours = model()
    export(ours, "transformers", tmp_path / "out")
    place = str(tmp_path / "out")
    theirs = transformers.AutoModel.from_pretrained(place, trust_remote_code=True).eval()
    processor = transformers.AutoProcessor.from_pretrained(place, trust_remote_code=True)
    words = processor(text=CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        close(theirs.get_text_features(**words).pooler_output, ours.encode_text(CAPTIONS))
        pixels = processor(images=image(32), return_tensors="pt")
        close(theirs.get_image_features(**pixels).pooler_output, ours.encode_image(image(32)))
    ask = transformers.pipeline("zero-shot-image-classification", model=place, device="cpu", trust_remote_code=True)
    found = ask(image(32), candidate_labels=["red", "a green square"], hypothesis_template="{}")
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(
        dict(ours.classify(image(32), ["red", "a green square"])), abs=1e-5
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModel.from_pretrained(place, trust_remote_code=False)


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_a_clip_text_tower_with_a_learnt_tokenizer_pools_its_own_end_token(kind: str, tmp_path: Path) -> None:
    """The library's own loader and tokenizer give our features, although the configuration names CLIP's end token."""
    tower = {
        "model_type": "clip_text_model",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
    }
    model = own("eos", vision="open_clip:ViT-B-32", text={**tower, "max_position_embeddings": 77})
    assert model.text.encoder.config.eos_token_id != model.tokenizer.sep_id
    assert export(model, kind, tmp_path / "out").difference < 1e-5


def a_classifier(model: mmssl.Model) -> Classifier:
    """Three labels in no alphabetic order, with a random head."""
    weight = 5 * torch.randn(3, model.config.embed_dim, generator=torch_generator("head"))
    return Classifier(model, ["dog", "cat", "bird"], weight, torch.tensor([0.1, 0.0, -0.1]))


def test_transformers_classifies(clip: mmssl.Model, tmp_path: Path) -> None:
    """`pipeline("image-classification")` gives the classifier's probabilities; the folder still has both towers."""
    classifier = a_classifier(clip)
    export(clip, "transformers", tmp_path / "out", classifier=classifier)
    place = str(tmp_path / "out")
    ask = transformers.pipeline("image-classification", model=place, device="cpu", trust_remote_code=True)
    found = {entry["label"]: entry["score"] for entry in ask(image(32))}
    assert found == pytest.approx(dict(classifier.predict(image(32))[0]), abs=1e-5)
    theirs = transformers.AutoModel.from_pretrained(place, trust_remote_code=True).eval()
    words = transformers.AutoProcessor.from_pretrained(place, trust_remote_code=True)(
        text=CAPTIONS, padding=True, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        close(theirs.get_text_features(**words).pooler_output, clip.encode_text(CAPTIONS))


@pytest.mark.parametrize("kind", ["open_clip", "sentence-transformers", "timm", "onnx"])
def test_the_code_in_the_card_classifies(kind: str, tmp_path: Path) -> None:
    """The lines of README.md, run as they are, give the classifier's probabilities of images of the model's size."""
    model = own()
    classifier = a_classifier(model)
    export(model, kind, tmp_path / "out", classifier=classifier)
    card = (tmp_path / "out" / "README.md").read_text().split("```")[1].removeprefix("python\n")
    pixels = model.render(image(32))[None]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in model.vision.statistics)
    given = [image(32)] if kind == "sentence-transformers" else (pixels / 255 - mean) / std
    scope: dict[str, Any] = {"torch": torch, "images": given}
    with contextlib.chdir(tmp_path), torch.no_grad():
        exec(compile(card, "README.md", "exec"), scope)
    found = scope["probabilities"] if kind != "onnx" else scope["session"].run(None, {"images": pixels.numpy()})[0]
    assert scope["labels"] == classifier.labels
    torch.testing.assert_close(torch.as_tensor(found), classifier.probabilities(image(32)), atol=1e-5, rtol=0)


def test_exports_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command evaluates what it wrote, on the run's first suite or on --data, prints the metrics that `mmssl eval`
    finds, and adds them to README.md; a classifier's are its accuracy, which needs its classes."""
    shards = tmp_path / "shards"
    shards.mkdir()
    write_pairs(shards)
    own().save(tmp_path / "run" / "model")
    (tmp_path / "run" / "config.yaml").write_text(dump_config(parse_config(run_tree(shards, tmp_path / "run"), "run")))
    ours = MMSSL(tmp_path / "run").evaluate(str(shards / "*.tar"))
    accuracy = next(iter(ours.values()))["acc1"]
    with pytest.raises(SystemExit) as end:
        main(["export", str(tmp_path / "run"), "--format", "open_clip", "--out", str(tmp_path / "out")])
    assert not end.value.code
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("colors/zero_shot acc1: "))
    assert f", {accuracy:.4f} before" in line
    assert f"Measured on {line}." in (tmp_path / "out" / "README.md").read_text()

    model = own()
    Classifier(model, list(COLORS), torch.randn(4, 16), torch.zeros(4)).save(tmp_path / "colours")
    given = ["--format", "timm", "--data", str(shards / "*.tar")]
    with pytest.raises(SystemExit) as end:
        main(["export", str(tmp_path / "colours"), *given, "--out", str(tmp_path / "timm")])
    assert not end.value.code
    files = [sample.image for sample in datasets.read(open_dataset(str(shards / "*.tar")))]
    labels = [int(sample.fields["cls"]) for sample in datasets.read(open_dataset(str(shards / "*.tar")))]
    right = load_classifier(tmp_path / "colours").probabilities(files).argmax(1) == torch.tensor(labels)
    assert f", {right.float().mean():.4f} before" in capsys.readouterr().out
    Classifier(model, ["dog", "cat"], torch.randn(2, 16), torch.zeros(2)).save(tmp_path / "pets")
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "pets"), *given, "--out", str(tmp_path / "none")])
    assert "has classes that the classifier lacks" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["own", "clip"])
def test_onnxruntime_opens_both_encoders(kind: str, clip: mmssl.Model, tmp_path: Path) -> None:
    """Any number of images and captions of any length; 8-bit weights stay near and are smaller (convolutions, most of
    the ResNet, keep theirs)."""
    model = clip if kind == "clip" else own()
    export(model, "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "image.onnx"), providers=["CPUExecutionProvider"])
    pixels = torch.stack([model.render(image(32)) for _ in range(7)])
    (features,) = session.run(None, {"images": pixels.numpy()})
    close(features, model.encode_rendered(pixels))
    theirs = OnnxEncoder(tmp_path / "out")
    for texts in (CAPTIONS, CAPTIONS[:1], CAPTIONS[1:2]):
        close(theirs.encode_text(texts), model.encode_text(texts))
    if kind == "clip":  # as torch writes graphs from 1.5 GB on: the weights in a file beside them
        for name in ("image.onnx", "text.onnx"):
            graph = onnx.load(tmp_path / "out" / name)
            options = {"save_as_external_data": True, "location": f"{name}.data", "size_threshold": 0}
            onnx.save(graph, tmp_path / "out" / name, **options)
    assert shrink(tmp_path / "out", 8) < (0.9 if kind == "clip" else 1)
    assert not list((tmp_path / "out").glob("*.data"))
    small = OnnxEncoder(tmp_path / "out")
    # Processors without VNNI add 8-bit products in 16 bits, which saturate: 0.95 on AVX2 alone.
    assert (small.encode_text(CAPTIONS) * model.encode_text(CAPTIONS)).sum(1).min() > 0.93


@pytest.mark.parametrize("vision", ["timm:resnet10t", "timm:vit_tiny_patch16_224"])
def test_timm_opens_the_vision_tower(vision: str, tmp_path: Path) -> None:
    """The folder's config.json says how."""
    model = own(vision=vision)
    export(model, "timm", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    weights = str(tmp_path / "out" / "model.safetensors")
    theirs = timm.create_model(settings["architecture"], checkpoint_path=weights, **settings["model_args"]).eval()
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(settings["pretrained_cfg"]), is_training=False
    )
    with torch.no_grad():
        found = model.encoder.project_image(theirs(transform(image(32))[None]))
    close(found, model.encode_image(image(32)))


@pytest.mark.parametrize(
    ("kind", "model", "words"),
    [
        ("open_clip", lambda: own(projection="mlp"), "MLP"),
        ("open_clip", lambda: own("eos"), "'eos'"),
        ("open_clip", lambda: own(vision="timm:vit_tiny_patch16_224"), "depth, embed_dim, num_heads"),
        ("transformers", lambda: mmssl.load("open_clip:RN50"), "RN50 is neither timm's nor.*choose from onnx"),
    ],
)
def test_a_model_that_a_format_cannot_store_is_refused(kind: str, model: Any, words: str, tmp_path: Path) -> None:
    """One line that lists what differs and which formats can; nothing is written."""
    with pytest.raises(UserError, match=words) as caught:
        export(model(), kind, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_export_never_overwrites(tmp_path: Path) -> None:
    """A folder with files in it is refused and keeps them; an unknown format names the known ones."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        export(own(), "timm", tmp_path)
    with pytest.raises(UserError, match=r"notes\.txt is not a folder"):
        export(own(), "timm", tmp_path / "notes.txt")
    with pytest.raises(UserError, match="sentence_transformers"):
        export(own(), "gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")])
def test_a_full_disk_is_reported(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one line, whichever library writes; no file is left."""

    def full(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("mmssl.apps.export.to_timm.save_file", full)
    with pytest.raises(UserError, match="out cannot be written: .*No space left.*give another folder"):
        export(own(), "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_describes_itself(tmp_path: Path) -> None:
    """README.md has Python code that compiles and loads it, the preprocessing, and a note on licences."""
    found = export(own(), "timm", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "create_model" in card
    assert "32 x 32 pixels" in card
    assert "Licence" in card
    for name in format_names():
        usage = find_format(name).usage("folder")
        compile(usage, "card", "exec")
        assert len(usage.splitlines()) in (3, 4)
    assert str(tmp_path) in found.usage


def test_a_folder_is_pushed_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository is made, and the folder uploaded; there an open_clip folder finds its text tower by the hub's
    name, here still by its own place, also where the hub cannot be reached."""
    calls: list[tuple[str, Any]] = []
    out = tmp_path / "out"

    def name() -> str:
        found = json.loads((out / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]["hf_model_name"]
        return str(found)

    class Api:
        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> str:
            calls.append(("create", (name, private, exist_ok)))
            return f"hub/{name}"

        def upload_folder(self, *, folder_path: str, repo_id: str, commit_message: str) -> None:
            calls.append(("upload", (folder_path, repo_id, name())))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    export(own(), "open_clip", out)
    assert push(out, "me/model") == "hub/me/model"
    assert calls == [("create", ("me/model", False, True)), ("upload", (str(out), "me/model", "me/model"))]
    assert name() == str(out)
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="is written, but could not be pushed to me/model") as caught:
        push(out, "me/model")
    assert "\n" not in str(caught.value)
    assert name() == str(out)


OWN = '''
"""A format of somebody else's package."""
import torch
from mmssl.apps.export.reader import CAPTIONS, Reader
LABEL = "torch.load"

def problems(model):
    return [] if model.config.projection == "linear" else ["its projections are MLPs"]

def write(model, folder):
    torch.save({text: model.encode_text(text)[0] for text in CAPTIONS}, folder / "features.pt")

def reader(model, folder):
    features = torch.load(folder / "features.pt")
    return Reader(model.encode_image, lambda texts: torch.stack([features[text] for text in texts]))

def usage(folder):
    return f"torch.load('{folder}/features.pt')"
'''


def test_a_format_is_found_by_its_dotted_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module outside of mmssl exports like a built-in one, from the command line too; its faults are one line."""
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "to_torch.py").write_text(OWN)
    (tmp_path / "my_lab" / "to_half.py").write_text('LABEL = "half"')
    monkeypatch.syspath_prepend(tmp_path)
    found = export(own(), "my_lab.to_torch", tmp_path / "out")
    assert found.difference < 1e-6
    assert found.usage == f"torch.load('{tmp_path}/out/features.pt')"
    own().save(tmp_path / "model")
    with pytest.raises(SystemExit) as end:
        main(["export", str(tmp_path / "model"), "--format", "my_lab.to_torch", "--out", str(tmp_path / "again")])
    assert not end.value.code
    assert (tmp_path / "again" / "features.pt").is_file()
    with pytest.raises(UserError, match="its projections are MLPs"):
        export(own(projection="mlp"), "my_lab.to_torch", tmp_path / "mlp")
    with pytest.raises(UserError, match="my_lab.to_half lacks problems, write, reader, usage"):
        export(own(), "my_lab.to_half", tmp_path / "half")
    with pytest.raises(UserError, match="export format 'my_lab.to_none': there is no module"):
        export(own(), "my_lab.to_none", tmp_path / "none")


@pytest.mark.parametrize("kind", ["open_clip", "transformers", "sentence-transformers", "onnx", "timm"])
def test_a_calibration_goes_along(kind: str, clip: mmssl.Model, tmp_path: Path) -> None:
    """The exported folder has the model's calibration.json, and the code of its README gives the probabilities of
    `match`; folders that load here again are calibrated. A tower alone, first dimensions and models without a
    calibration have none."""
    plain = clip if kind == "transformers" else own()
    model = mmssl.Model(plain.encoder, plain.tokenizer, plain.config)
    model.calibration = some_calibration()
    for name, source in (("out", model), ("plain", plain), ("short", model.first_dimensions(8))):
        export(source, kind, tmp_path / name)
        readme = (tmp_path / name / "README.md").read_text()
        assert (tmp_path / name / "calibration.json").exists() == (name == "out" and kind != "timm")
        assert ("calibration.json" in readme) == (name == "out" and kind != "timm")
    if kind == "timm":
        return
    expected = model.match(image(32), CAPTIONS)[0]
    similarities = (model.encode_image(image(32)) @ model.encode_text(CAPTIONS).T)[0].tolist()
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[2].split("```")[0]
    names: dict[str, Any] = {}
    with contextlib.chdir(tmp_path / "out"):
        exec(code, names)
    assert [names["match"](value) for value in similarities] == pytest.approx(expected.tolist(), abs=1e-9)
    if kind in ("open_clip", "transformers"):
        again = mmssl.load(tmp_path / "out")
        torch.testing.assert_close(again.match(image(32), CAPTIONS)[0], expected, atol=1e-4, rtol=0)
        assert mmssl.load(tmp_path / "plain").calibration is None
