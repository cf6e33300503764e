"""The configuration refuses what it does not understand, and says what to do."""

from pathlib import Path

import pytest
import yaml

from mmssl.config import Config, dump_config, known_keys, load_config, parse_config
from mmssl.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def tree() -> dict[str, object]:
    return {
        "run_dir": "runs/x",
        "data": {"train": "x.tar"},
        "model": {"text": {"config": {"model_type": "bert"}, "tokenizer": "train"}},
        "train": {"steps": 3},
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configurations_are_valid_and_say_how_to_use_them(path: Path) -> None:
    """Every file in configs/ parses, survives a round trip, and its header names command, hardware and expectation."""
    config = load_config(path)
    assert parse_config(yaml.safe_load(dump_config(config)), "again") == config
    header = path.read_text(encoding="utf-8").partition("run_dir")[0]
    assert all(word in header for word in ("command:", "hardware:", "expect:"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optim.lrr=1", ["optim.lrr", "optim.lr"]),
        ("optm.lr=1", ["'optm'", "'optim'"]),
        ("data.views.main.crop=1", ["data.views.main.crop"]),
        ("model.vision.nam=x", ["model.vision.nam", "model.vision.name"]),
        ("seed=many", ["'seed'", "'many'", "integer"]),
        ("train.precision=fp8", ["train.precision", "fp32"]),
        ("train.minutes=1", ["exactly one", "steps", "minutes"]),
        ("data.batch_size=0", ["data.batch_size"]),
        ("data.lanes=3", ["data.lanes=3", "256"]),
        ("model.text.name=x", ["model.text", "exactly one"]),
        ("objectives.contrastive.weight=0", ["objectives", "weight"]),
        ("seed", ["key=value"]),
        ("run_dir.x=1", ["run_dir", "not a section"]),
        ("seed=[1", ["seed=[1", "YAML"]),
    ],
)
def test_each_mistake_is_one_line_that_names_the_key(tmp_path: Path, change: str, words: list[str]) -> None:
    """A wrong key, type, value or combination ends in one line with the key and the remedy."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree()))
    with pytest.raises(UserError) as caught:
        load_config(path, [change])
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "\xff"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    """Empty, non-mapping, broken and wrongly encoded files are user errors, as is a missing one."""
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError):
        load_config(path)
    with pytest.raises(UserError, match="no configuration file"):
        load_config(tmp_path / "none.yaml")


def test_overrides_win_and_values_are_yaml(tmp_path: Path) -> None:
    """`key=value` replaces, creates sections on the way, and parses lists, numbers and null."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree()))
    config = load_config(path, ["train.steps=null", "train.minutes=0.5", "optim.betas=[0.8, 0.9]", "optim.lr=1e-3"])
    assert (config.train.steps, config.train.minutes, config.optim.betas, config.optim.lr) == (
        None,
        0.5,
        (0.8, 0.9),
        1e-3,
    )


def test_the_configuration_is_frozen_and_every_field_documented() -> None:
    """No field can be assigned, and each has a description that the reference shows."""
    config = parse_config(tree(), "here")
    with pytest.raises(Exception, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    seen = set()
    stack = [Config]
    while stack:
        section = stack.pop()
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            seen.add(name)
    assert {"run_dir", "seed"} <= seen
    assert {
        "data.train",
        "data.batch_size",
        "train.steps",
        "train.minutes",
        "train.precision",
        "optim.lr",
    } <= set(known_keys())


def test_a_cache_of_resized_images_needs_a_folder(tmp_path: Path) -> None:
    """The error names both keys; the keys of 0.1.0 are read as the folder and its size."""
    changed = tree()
    changed["data"] = {"train": "x.tar", "cache": {"resize": 512}}
    with pytest.raises(UserError, match=r"data\.cache\.resize=512 needs a folder .* give data\.cache\.dir"):
        parse_config(changed, "x.yaml")
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump({**tree(), "data": {"train": "x.tar", "cache_dir": "/cache", "cache_gib": 7.0}}))
    cache = load_config(file).data.cache
    assert (cache.dir, cache.gib, cache.resize) == (Path("/cache"), 7.0, None)
