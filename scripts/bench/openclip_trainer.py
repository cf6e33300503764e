"""OpenCLIP's side of compare_openclip.py; runs in OpenCLIP's own environment and knows nothing of mmssl.

    python openclip_trainer.py train MODELS TIMES ARGUMENT...     OpenCLIP's trainer, timed
    python openclip_trainer.py eval MODELS NAME CHECKPOINT TESTS   prints JSON {test: acc1}, writes CHECKPOINT.TEST.pt

MODELS holds model configs and tower.json, the timm model (with its options) that they call `peer_tower`.
TESTS is JSON {test: {"shards": [...], "classnames": file or null, "templates": file}}. A test whose samples have
captions gives a file of their embeddings: `images` and `texts`, unit rows [N, D], and `captions`.
"""

import io
import json
import sys
import tarfile
import time
from pathlib import Path

import open_clip
import timm
import torch
from PIL import Image


def add_models(models: str) -> None:
    """Make the model configs, and the timm tower they name, known to OpenCLIP and timm."""
    tower = json.loads((Path(models) / "tower.json").read_text())

    def peer_tower(pretrained: bool = False, **kwargs: object) -> torch.nn.Module:
        return timm.create_model(tower["name"], pretrained=pretrained, **{**tower["options"], **kwargs})

    timm.models.register_model(peer_tower)
    open_clip.add_model_config(models)


def train(models: str, times: str, arguments: list[str]) -> None:
    """OpenCLIP's main(), with the seconds of each epoch (training alone, no start-up) written to `times`."""
    from open_clip_train import main as trainer

    add_models(models)
    seconds: list[float] = []
    one_epoch = trainer.train_one_epoch

    def timed(*args: object, **kwargs: object) -> None:
        start = time.monotonic()
        one_epoch(*args, **kwargs)
        seconds.append(time.monotonic() - start)

    trainer.train_one_epoch = timed
    trainer.main(arguments)
    Path(times).write_text(json.dumps(seconds))


def read_samples(shards: list[str]) -> list[tuple[Image.Image, str, str | None]]:
    """Images, labels (the .cls member, or else `label` of the .json member), and captions."""
    samples: dict[tuple[str, str], dict[str, bytes]] = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.isfile():
                    key, _, extension = member.name.partition(".")
                    samples.setdefault((shard, key), {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    read = []
    for members in samples.values():
        image = next(members[e] for e in ("webp", "png", "jpg", "jpeg") if e in members)
        label = members["cls"].decode() if "cls" in members else json.loads(members["json"])["label"]
        caption = members["txt"].decode() if "txt" in members else None
        read.append((Image.open(io.BytesIO(image)), label, caption))
    return read


@torch.no_grad()
def accuracy(model: torch.nn.Module, preprocess, tokenizer, test: dict, place: Path | None = None) -> float:  # type: ignore[no-untyped-def,type-arg]
    """Zero-shot accuracy with OpenCLIP's own classifier builder; embeddings of image-caption pairs go to `place`."""
    samples = read_samples(test["shards"])
    if test["classnames"] is not None:
        names = Path(test["classnames"]).read_text(encoding="utf-8").splitlines()
        targets = torch.tensor([int(label) for _, label, _ in samples])
    else:
        names = sorted({label for _, label, _ in samples})
        targets = torch.tensor([names.index(label) for _, label, _ in samples])
    lines = Path(test["templates"]).read_text(encoding="utf-8").splitlines()
    templates = [lambda c, line=line: line.replace("{c}", c) for line in lines if line]
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)
    pixels = [torch.stack([preprocess(image) for image, _, _ in part]) for part in batches(samples)]
    images = torch.cat([model.encode_image(part, normalize=True) for part in pixels])  # type: ignore[operator]
    captions = [caption for _, _, caption in samples if caption is not None]
    if place is not None and len(captions) == len(samples):
        texts = torch.cat([model.encode_text(tokenizer(part), normalize=True) for part in batches(captions)])  # type: ignore[operator]
        torch.save({"images": images, "texts": texts, "captions": captions}, place)
    return float(((images @ classifier).argmax(1) == targets).float().mean())


def batches(rows: list, size: int = 256) -> list[list]:  # type: ignore[type-arg]
    """Rows in lists of `size`."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def evaluate(models: str, name: str, checkpoint: str, tests: str) -> None:
    """Print {test: acc1} of a checkpoint of OpenCLIP's trainer."""
    add_models(models)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    open_clip.load_checkpoint(model, checkpoint, weights_only=True)
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)
    found = {
        name: accuracy(model, preprocess, tokenizer, test, Path(f"{checkpoint}.{name}.pt"))
        for name, test in json.loads(tests).items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        evaluate(*sys.argv[2:6])
