"""An exported folder in an environment that holds its library alone, neither mmssl nor what lies around it.

`pytest -s -m slow tests/apps/export/test_fresh_environments.py` prints the differences and accuracies.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mmssl
from mmssl.apps.export import export
from mmssl.apps.finetune import Classifier
from mmssl.config import parse_config
from mmssl.evaluate import datasets, encode, open_dataset
from mmssl.rng import torch_generator
from mmssl.train.trainer import train
from tests.helpers.models import TINY_TEXT

ROOT = Path(__file__).parents[3]
DATA = ROOT / "shards" / "emoji-unseen-style"
CLIP_TEXT = {"model_type": "clip_text_model", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWERS: dict[str, dict[str, Any]] = {
    "ResNet and BERT": {"vision": {"name": "timm:resnet10t"}, "text": {"config": TINY_TEXT, "pooling": "mean"}},
    "CLIP": {
        "vision": {
            "name": "open_clip:ViT-B-32",
            "options": {"width": 64, "layers": 2, "head_width": 32, "patch_size": 16},
        },
        "text": {"config": {**CLIP_TEXT, "intermediate_size": 128, "max_position_embeddings": 24}, "pooling": "eos"},
    },
}
BEGIN = """
import io, json, sys, tarfile
import numpy as np
from PIL import Image

folder, shard, prompts, out = sys.argv[1:]
prompts = json.loads(prompts)
with tarfile.open(shard) as tar:
    members = [member for member in tar.getmembers() if member.name.endswith(".webp")]
    images = [Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB") for member in members]
"""
END = """
assert "mmssl" not in sys.modules
np.savez(out, images=np.asarray(image_features), texts=np.asarray(text_features), probabilities=probabilities)
"""
HEAD = """
from safetensors.numpy import load_file
head = load_file(f"{folder}/head.safetensors")
unit = np.asarray(image_features) / np.linalg.norm(image_features, axis=1, keepdims=True)
logits = unit @ head["weight"].T + head["bias"]
probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
"""
TRANSFORMERS = """
import torch
from transformers import AutoModel, AutoProcessor, pipeline
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    image_features = model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output
    words = processor(text=prompts, padding=True, truncation=True, return_tensors="pt")
    text_features = model.get_text_features(**words).pooler_output
"""
LABELLED = """
classify = pipeline("image-classification", model=folder, trust_remote_code=True)
found = [{entry["label"]: entry["score"] for entry in classify(image, top_k=len(prompts))} for image in images]
probabilities = [[row[prompt] for prompt in prompts] for row in found]
"""
ASKED = """
ask = pipeline("zero-shot-image-classification", model=folder)
found = [
    {entry["label"]: entry["score"] for entry in ask(image, candidate_labels=prompts, hypothesis_template="{}")}
    for image in images[:20]
]
probabilities = [[row[prompt] for prompt in prompts] for row in found]
"""
SENTENCES = """
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(folder)
image_features, text_features = model.encode(images), model.encode(prompts)
"""
OPEN_CLIP = """
import open_clip, torch
model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
model.eval()
with torch.no_grad():
    image_features = model.encode_image(torch.stack([preprocess(image) for image in images]))
    text_features = model.encode_text(tokenizer(prompts))
"""
ONNX = """
import onnxruntime, tokenizers
def run(name, **inputs):
    return onnxruntime.InferenceSession(f"{folder}/{name}").run(None, inputs)[0]
pixels = np.concatenate([run("pixels.onnx", image=np.asarray(image)) for image in images])
image_features, probabilities = run("image.onnx", images=pixels), run("classifier.onnx", images=pixels)
tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer/tokenizer.json")
tokenizer.enable_padding(pad_id=json.load(open(f"{folder}/config.json"))["pad_id"])
rows = tokenizer.encode_batch(prompts)
tokens, mask = (np.array([getattr(row, kind) for row in rows]) for kind in ("ids", "attention_mask"))
text_features = run("text.onnx", tokens=tokens, mask=mask)
"""
CASES = {
    "transformers": ("CLIP", ["transformers", "torch", "pillow"], TRANSFORMERS + ASKED),
    "transformers and timm": (
        "ResNet and BERT",
        ["transformers", "torch", "torchvision", "pillow", "timm"],
        TRANSFORMERS + LABELLED,
    ),
    "sentence-transformers": ("ResNet and BERT", ["sentence-transformers", "pillow", "timm"], SENTENCES + HEAD),
    "open_clip": ("ResNet and BERT", ["open_clip_torch", "transformers"], OPEN_CLIP + HEAD),
    "onnx": ("ResNet and BERT", ["onnxruntime", "pillow", "tokenizers"], ONNX),
}
"""Name -> towers, packages, and a program that computes features of all images and prompts, and probabilities."""


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Classifier]:
    """Of each kind of towers a model trained for seconds, with a head of the class names and a random bias."""
    found = {}
    names = open_dataset(DATA).classnames
    assert names is not None
    for name, towers in TOWERS.items():
        run = tmp_path_factory.mktemp("runs") / "run"
        text = {**towers["text"], "tokenizer": "train", "vocab_size": 1000, "max_tokens": 24}
        tree = {
            "run_dir": str(run),
            "data": {"train": str(ROOT / "shards" / "train" / "*.tar"), "batch_size": 64, "captions": ["{label}"]},
            # Images as large as the samples: other libraries resize with other rounding.
            "model": {"embed_dim": 64, "vision": {**towers["vision"], "image_size": 64}, "text": text},
            "optim": {"lr": 1e-3},
            "train": {"steps": 60, "threads": 1, "trackers": []},
        }
        train(parse_config(tree, "the test"))
        model = mmssl.load(run)
        weight = model.logit_scale * encode.class_weights(model, names, ("{c}",))
        found[name] = Classifier(model, names, weight, torch.randn(len(names), generator=torch_generator("bias")))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_library_alone_gives_our_results(
    name: str, classifiers: dict[str, Classifier], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Outside the clone, without a network, with its library only: embeddings of all images and prompts of the
    evaluation set to 1e-5, probabilities to 1e-4, of a classifier's head or of transformers' zero-shot pipeline, and
    the same zero-shot accuracy."""
    towers, packages, code = CASES[name]
    classifier = classifiers[towers]
    model, zero_shot = classifier.model, ASKED in code
    kind = name.partition(" ")[0]
    options = {"pixels": True} if kind == "onnx" else {}
    folder = tmp_path / "exported"
    export(model, kind, folder, classifier=None if zero_shot else classifier, **options)
    python = python_with(packages, tmp_path / "environment")
    arguments = [str(folder), str(DATA / "test" / "0.tar"), json.dumps(classifier.labels), str(tmp_path / "found.npz")]
    run_there(python, ["-c", BEGIN + code + END, *arguments], tmp_path)

    samples = list(datasets.read(open_dataset(DATA)))
    files = [sample.image for sample in samples]
    images, texts = model.encode_image(files), model.encode_text(classifier.labels)
    ours = (model.logit_scale * images[:20] @ texts.T).softmax(1) if zero_shot else classifier.probabilities(files)
    with np.load(tmp_path / "found.npz") as found:
        theirs = {key: torch.from_numpy(found[key]).float() for key in found}
    theirs |= {key: torch.nn.functional.normalize(theirs[key], dim=1) for key in ("images", "texts")}
    differences = {
        key: float((theirs[key] - rows).abs().max())
        for key, rows in {"images": images, "texts": texts, "probabilities": ours}.items()
    }
    labels = torch.tensor([int(sample.fields["cls"]) for sample in samples])
    accuracies = [
        float(((x @ y.T).argmax(1) == labels).double().mean())
        for x, y in ((images, texts), (theirs["images"], theirs["texts"]))
    ]
    with capsys.disabled():
        shown = ", ".join(f"{key} {value:.1e}" for key, value in differences.items())
        print(f"\n{name}, {towers}: {shown}; zero-shot accuracy {accuracies[1]:.4f}, ours {accuracies[0]:.4f}")
    assert max(differences["images"], differences["texts"]) < 1e-5
    assert differences["probabilities"] < 1e-4
    assert accuracies[0] == accuracies[1]
    assert accuracies[0] > 1 / 400  # chance

    if kind == "onnx":
        photo = tmp_path / "photo.png"
        photo.write_bytes(files[0])
        printed = json.loads(run_there(python, [str(folder / "run.py"), str(photo)], tmp_path))
        assert printed == pytest.approx(classifier.predict(photo)[0], abs=1e-4)


def python_with(packages: list[str], folder: Path) -> Path:
    """The Python of a new environment with these packages, in the versions installed here, and what they need.

    Skips the test without uv, or if no package registry answers.
    """
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        pytest.skip("uv is not installed")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
    listing = subprocess.run([uv, "pip", "freeze", "-p", sys.executable], capture_output=True, text=True, check=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(line for line in listing.stdout.splitlines() if "==" in line))
    python = folder / "bin" / "python"
    command = [uv, "pip", "install", "--quiet", "-p", str(python), "-c", str(constraints), *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no package registry gives {', '.join(packages)}: {done.stderr.strip().splitlines()[-1]}")
    return python


def run_there(python: Path, command: list[str], place: Path) -> str:
    """What a program prints in another environment, without a network and without a cache of models."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(place), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(python), "-I", *command], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
