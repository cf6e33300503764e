"""Model folders from elsewhere are used or refused in one line. They reach no network, ask nothing, run nothing, and
neither hang nor take memory that their weights do not need."""

import builtins
import io
import json
import os
import pickle
import shutil
import socket
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel

from mmssl.config import TextConfig
from mmssl.data.transforms import load_tokenizer
from mmssl.errors import UserError
from mmssl.inference import Model, load
from mmssl.models.pretrained import foreign
from mmssl.models.text_factory import build_text
from mmssl.system import without_network
from tests.helpers.open_clip_folders import write_open_clip

GOLDEN = Path(__file__).parents[1] / "golden" / "model"
SECONDS, BYTES = 60, 2 << 30
"""Bounds on the time and memory that a refusal takes; what is attempted would take minutes and terabytes."""
DEEP = "[" * 100_000 + "]" * 100_000
LEAK = "http://127.0.0.1:9/evil.npz"


class Bomb:
    """A pickle that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture(autouse=True)
def contacts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Attempts to reach the network and questions to the user, which also fail."""
    found: list[str] = []

    def refuse(name: str) -> Callable[..., Any]:
        def attempt(*args: Any, **kwargs: Any) -> Any:
            found.append(f"{name} {args}")
            raise OSError(f"{name} in a test")

        return attempt

    monkeypatch.setattr(socket, "getaddrinfo", refuse("getaddrinfo"))
    monkeypatch.setattr(socket.socket, "connect", refuse("connect"))
    monkeypatch.setattr(builtins, "input", refuse("input"))
    return found


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of each kind: our own, open_clip's, and transformers' CLIP."""
    folder = tmp_path_factory.mktemp("templates")
    shutil.copytree(GOLDEN, folder / "own")
    write_open_clip(folder / "open_clip", "vit")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 200, "max_position_embeddings": 77, "eos_token_id": 3},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder / "hf")
    BertModel(BertConfig(vocab_size=200, **small)).save_pretrained(folder / "bert")
    for kind in ("hf", "bert"):
        shutil.copytree(GOLDEN / "tokenizer", folder / kind, dirs_exist_ok=True)
    return folder


def _set(file: str, *keys: str, value: Any) -> Callable[[Path], None]:
    """Set a key of a JSON file."""

    def change(folder: Path) -> None:
        tree = node = json.loads((folder / file).read_text())
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value
        (folder / file).write_text(json.dumps(tree))

    return change


def _tower(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder), 77)
    build_text(TextConfig(name=str(folder)), tokenizer.vocab_size, tokenizer.pad_id)


def _text(file: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(content)


def _fifo(file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return change


def _cut(file: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:1000])


def _pickled(old: str, new: str, form: str) -> Callable[[Path], None]:
    """Replace the weights by a pickle that would create the file `ran` in the folder."""

    def change(folder: Path) -> None:
        bomb = Bomb(folder / "ran")
        (folder / old).unlink()
        if form == "zip":
            torch.save({"weight": bomb}, folder / new)
        elif form == "plain":
            (folder / new).write_bytes(pickle.dumps({"weight": bomb}))
        elif form == "legacy":
            torch.save({"weight": bomb}, folder / new, _use_new_zipfile_serialization=False)
        elif form == "npz":
            with (folder / new).open("wb") as file:
                np.savez(file, weight=np.array([bomb], dtype=object))
        else:
            content = io.BytesIO()
            with zipfile.ZipFile(content, "w") as archive:
                archive.writestr("archive/code/x.py", "raise SystemExit")
            (folder / new).write_bytes(content.getvalue())

    return change


def _remote_code(file: str) -> Callable[[Path], None]:
    """Declare a class of the folder's own module, under a kind that the library does not have."""

    def change(folder: Path) -> None:
        (folder / "evil.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
        tree = json.loads((folder / file).read_text())
        names = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor")
        tree["auto_map"] = dict.fromkeys(names, "evil.Evil")
        tree["model_type" if file == "config.json" else "tokenizer_class"] = "evil_kind"
        (folder / file).write_text(json.dumps(tree))

    return change


def _pattern(file: str) -> Callable[[Path], None]:
    """Split words by a regular expression that takes exponential time."""

    def change(folder: Path) -> None:
        tree = json.loads((folder / file).read_text())
        tree["pre_tokenizer"] = {
            "type": "Split",
            "pattern": {"Regex": "(a+)+$"},
            "behavior": "Isolated",
            "invert": False,
        }
        (folder / file).write_text(json.dumps(tree))

    return change


CONFIG, OPEN_CLIP, WEIGHTS = "config.json", "open_clip_config.json", "model.safetensors"
ATTACKS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "own, deep JSON": ("own", _text(CONFIG, '{"format": 1, "model": ' + DEEP + "}")),
    "own, not JSON": ("own", _text(CONFIG, "\x00\xff{")),
    "own, a list": ("own", _text(CONFIG, "[1, 2]")),
    "own, cut weights": ("own", _cut(WEIGHTS)),
    "own, weights are a named pipe": ("own", _fifo(WEIGHTS)),
    "own, tokenizer is a named pipe": ("own", _fifo("tokenizer/tokenizer.json")),
    "own, deep tokenizer": ("own", _text("tokenizer/tokenizer.json", DEEP)),
    "own, deep tokenizer settings": ("own", _text("tokenizer/tokenizer_config.json", DEEP)),
    "own, address": (
        "own",
        _set(CONFIG, "model", "vision", "options", "pretrained_cfg", value={"url": LEAK, "file": "/evil.npz"}),
    ),
    "own, hub name": (
        "own",
        _set(CONFIG, "model", "vision", "options", "pretrained_cfg_overlay", value={"hf_hub_id": "evil/model"}),
    ),
    "own, pretrained": ("own", _set(CONFIG, "model", "vision", "options", "pretrained", value=True)),
    "own, checkpoint": ("own", _set(CONFIG, "model", "vision", "options", "checkpoint_path", value=LEAK)),
    "own, other weights": ("own", _set(CONFIG, "model", "vision", "pretrained", value="in1k")),
    "own, other model": ("own", _set(CONFIG, "model", "start", value="open_clip:ViT-B-32/openai")),
    "own, hub text tower": (
        "own",
        _set(CONFIG, "model", "text", value={"name": "evil/model", "tokenizer": "tokenizer"}),
    ),
    "own, option text": ("own", _set(CONFIG, "model", "vision", "options", "act_layer", value="import('os')")),
    "own, option kind": ("own", _set(CONFIG, "model", "vision", "options", "num_heads", value=0)),
    "own, unknown kind": ("own", _set(CONFIG, "model", "text", "config", "model_type", value="import('os')")),
    "own, layers": ("own", _set(CONFIG, "model", "vision", "options", "depth", value=50_000_000)),
    "own, width": ("own", _set(CONFIG, "model", "vision", "options", "embed_dim", value=2_000_000)),
    "own, text layers": ("own", _set(CONFIG, "model", "text", "config", "num_hidden_layers", value=50_000_000)),
    "own, text width": ("own", _set(CONFIG, "model", "text", "config", "hidden_size", value=4_000_000)),
    "own, vocabulary": ("own", _set(CONFIG, "model", "text", "config", "vocab_size", value=10**12)),
    "own, image size": ("own", _set(CONFIG, "model", "vision", "image_size", value=4_000_000)),
    "own, dimensions": ("own", _set(CONFIG, "model", "embed_dim", value=10**12)),
    "open_clip, deep JSON": ("open_clip", _text(OPEN_CLIP, DEEP)),
    "open_clip, no settings": ("open_clip", _text(OPEN_CLIP, "{}")),
    "open_clip, layers": ("open_clip", _set(OPEN_CLIP, "model_cfg", "text_cfg", "layers", value=50_000_000)),
    "open_clip, vocabulary": ("open_clip", _set(OPEN_CLIP, "model_cfg", "text_cfg", "vocab_size", value=10**12)),
    "open_clip, positions": ("open_clip", _set(OPEN_CLIP, "model_cfg", "text_cfg", "context_length", value=10**7)),
    "open_clip, hub text tower": (
        "open_clip",
        _set(OPEN_CLIP, "model_cfg", "text_cfg", value={"hf_model_name": "evil/model", "hf_tokenizer_name": "evil/x"}),
    ),
    "open_clip, hub tower": (
        "open_clip",
        _set(OPEN_CLIP, "model_cfg", "vision_cfg", value={"timm_model_name": "hf-hub:evil/model", "image_size": 32}),
    ),
    "transformers, deep JSON": ("hf", _text(CONFIG, '{"model_type": "clip", "x": ' + DEEP + "}")),
    "transformers, remote code": ("hf", _remote_code(CONFIG)),
    "transformers, layers": ("hf", _set(CONFIG, "vision_config", "num_hidden_layers", value=50_000_000)),
    "transformers, vocabulary": ("hf", _set(CONFIG, "text_config", "vocab_size", value=10**12)),
    "transformers, activation": ("hf", _set(CONFIG, "text_config", "hidden_act", value="import('os')")),
    "transformers, cut weights": ("hf", _cut(WEIGHTS)),
    "transformers, named pipe": ("hf", _fifo(WEIGHTS)),
} | {
    f"{kind}, {form} pickle {new}": (kind, _pickled(old, new, form))
    for kind, old, news in (
        ("own", WEIGHTS, [WEIGHTS]),
        ("open_clip", "open_clip_model.safetensors", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"]),
        ("hf", WEIGHTS, ["pytorch_model.bin"]),
    )
    for new in news
    for form in ("zip", "plain", "legacy", "npz", "archive")
}
"""A template, and what is done to it. None of these folders can be used."""


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_folder_is_refused(attack: str, templates: Path, tmp_path: Path, contacts: list[str]) -> None:
    """`load` ends with one line, soon, in little memory, without the network or a question, and runs nothing."""
    kind, change = ATTACKS[attack]
    folder = tmp_path / "folder"
    shutil.copytree(templates / kind, folder)
    change(folder)
    start, before = time.monotonic(), psutil.Process().memory_info().rss
    with pytest.raises(UserError) as error:
        load(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1_000
    assert contacts == []
    assert not (folder / "ran").exists()
    assert time.monotonic() - start < SECONDS
    assert psutil.Process().memory_info().rss - before < BYTES


@pytest.mark.parametrize(("kind", "place"), [("own", "tokenizer"), ("hf", "."), ("bert", ".")])
def test_code_of_a_tokenizer_does_not_run(
    kind: str, place: str, templates: Path, tmp_path: Path, contacts: list[str]
) -> None:
    """A folder whose tokenizer names a class of its own is read without that class, or refused."""
    folder = tmp_path / "folder"
    shutil.copytree(templates / kind, folder)
    _remote_code("tokenizer_config.json")(folder / place)
    with suppress(UserError):
        load(folder) if kind != "bert" else _tower(folder)
    assert contacts == []
    assert not list(folder.rglob("ran"))


@pytest.mark.parametrize("kind", ["own", "open_clip", "hf"])
def test_the_same_folders_unchanged_are_used(kind: str, templates: Path, contacts: list[str]) -> None:
    """The templates load and encode, so the refusals above are due to the changes."""
    model = load(templates / kind)
    assert isinstance(model, Model)
    assert model.encode_text(["a red square"]).shape == (1, model.config.embed_dim)
    assert contacts == []


@pytest.mark.parametrize(
    "change",
    [
        _remote_code(CONFIG),
        _set(CONFIG, "num_hidden_layers", value=50_000_000),
        _text(CONFIG, DEEP),
        _pickled(WEIGHTS, "pytorch_model.bin", "zip"),
        _fifo(WEIGHTS),
    ],
    ids=["code", "layers", "deep", "pickle", "named pipe"],
)
def test_a_hostile_text_tower_is_refused(
    change: Callable[[Path], object], templates: Path, tmp_path: Path, contacts: list[str]
) -> None:
    """A folder named in a configuration as the text tower, with its tokenizer, is held to the same."""
    folder = tmp_path / "folder"
    shutil.copytree(templates / "bert", folder)
    change(folder)
    with pytest.raises(UserError) as error:
        _tower(folder)
    assert "\n" not in str(error.value)
    assert contacts == []
    assert not (folder / "ran").exists()


def test_a_tokenizer_that_panics_is_an_error_of_one_line(templates: Path, tmp_path: Path) -> None:
    """A pattern that the library gives up on, by a panic that no `except Exception` catches, ends with one line."""
    folder = tmp_path / "folder"
    shutil.copytree(templates / "own", folder)
    _pattern("tokenizer/tokenizer.json")(folder)
    with pytest.raises(UserError, match="tokenizer") as error:
        load(folder).encode_text(["a" * 200 + "!"])
    assert "\n" not in str(error.value)


def test_the_network_is_closed_for_the_block_only() -> None:
    """Connections, look-ups and questions raise the reason inside, and nothing of ours outside or in other threads."""
    with socket.socket(type=socket.SOCK_DGRAM) as sender, ThreadPoolExecutor(1) as other:
        send = partial(sender.sendto, b"", ("127.0.0.1", 9))
        for attempt in (send, partial(socket.gethostbyname, "localhost")):
            with without_network("closed here"), pytest.raises(PermissionError, match="closed here"):
                attempt()
            with without_network("closed here"):
                other.submit(attempt).result()
            attempt()


def test_a_budget_stops_before_the_memory_is_taken(tmp_path: Path) -> None:
    """Tensors of terabytes raise before they exist, one by one or in sum; within the budget nothing changes."""
    for make in (
        lambda: torch.zeros(10**12),
        lambda: torch.nn.Linear(10**6, 10**6),
        lambda: [torch.empty(1) for _ in range(10**6)],
    ):
        with pytest.raises(UserError, match="far larger model"), foreign.reading(tmp_path):
            make()
    with foreign.reading(tmp_path):
        torch.manual_seed(0)
        inside = torch.nn.Linear(3, 4)
    torch.manual_seed(0)
    assert torch.equal(inside.weight, torch.nn.Linear(3, 4).weight)
