"""The plan of rooms holds: layers, owners of third parties, and no setting that nothing reads."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmssl.config import Config, known_keys

ROOT = Path(__file__).parents[1] / "mmssl"
LAYERS = {
    **dict.fromkeys(("config", "types", "rng", "losses"), 0),
    **dict.fromkeys(("distributed", "peers"), 1),
    **dict.fromkeys(("data", "models"), 2),
    **dict.fromkeys(("objectives", "evaluate"), 3),
    **dict.fromkeys(("build", "model"), 4),
    **dict.fromkeys(("train", "bench", "cost", "describe", "doctor", "explain", "export", "report", "search"), 5),
    "finetune": 5,
    "cli_finetune": 6,
    **dict.fromkeys(("ablate", "cli", "cli_ablate", "cli_bench", "cli_compare", "cli_doctor", "cli_eval"), 6),
    **dict.fromkeys(("auto", "predict"), 5),
    **dict.fromkeys(("__init__", "api", "cli_predict", "cli_train"), 6),
    **dict.fromkeys(("cli_report", "cli_serve", "cli_shards", "cli_use", "serve", "__main__"), 6),
}
STRANGERS = [{"data", "models"}, {"objectives", "evaluate"}]
OWNERS = {
    "accelerate": ("train/", "bench/"),
    "open_clip": ("models/", "evaluate/prompts.py", "export/", "bench/"),
    "timm": ("models/vision.py", "models/vision_build.py", "models/pixels.py", "export/"),
    "transformers": ("models/", "data/tokens.py", "train/start.py", "export/"),
    "braceexpand": ("data/sources/",),
    "yaml": ("config/",),
    "imagecorruptions": ("evaluate/corruptions.py",),
    "matplotlib": (
        "evaluate/",
        "data/",
        *(f"{room}/image.py" for room in ("ablate", "explain", "finetune", "predict", "search")),
    ),
    "peft": ("models/lora.py",),
    "jinja2": ("report/",),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn"), ("serve/",)),
    "torch.distributed": ("distributed.py", "peers.py", "train/launch.py", "train/shard.py"),
    "pickle": (),
}
MODULES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules a file imports, `from x import y` giving both x and x.y."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_imports_a_higher_room_or_a_stranger(path: Path) -> None:
    """A module's mmssl imports lie in its own layer or below, and never in the room beside that it must not know."""
    own = room(path)
    if own in ("cli", "__main__") or path.name == "__main__.py":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "mmssl" or len(parts) < 2 or parts[1] not in LAYERS:
            continue
        assert LAYERS[parts[1]] <= LAYERS[own], f"{path} imports {name}"
        assert own == parts[1] or {own, parts[1]} not in STRANGERS, f"{path} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_third_parties_have_owners(path: Path) -> None:
    """A library with an owner is imported by it alone."""
    place = path.relative_to(ROOT).as_posix()
    for name in imports(path):
        for library, owners in OWNERS.items():
            if name == library or name.startswith(f"{library}."):
                assert place.startswith(owners or "none"), f"{place} imports {name}"


def test_every_setting_is_read_somewhere() -> None:
    """Each field of the configuration occurs as an attribute in some room other than its definition's."""
    read = {
        node.attr
        for path in MODULES
        if room(path) != "config"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    names = {key.rsplit(".", 1)[-1] for key in known_keys(Config)}
    assert names - read == set()
