"""Chosen settings follow the pairs and the machine, fit together, and yield to pinned settings."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmssl.apps.autoconfig import Choice, Machine, Pairs, Start, choose
from mmssl.apps.autoconfig.choices import BYTES_PER_PARAMETER, FILL, max_tokens
from mmssl.apps.autoconfig.preparation import Prepared
from mmssl.apps.autoconfig.towers import TOWERS, choose_towers
from mmssl.apps.autoconfig.training import selection
from mmssl.config import Config, known_keys, parse_config, set_key

GIB = 2**30
pairs = st.builds(
    Pairs,
    count=st.integers(8, 50_000_000),
    caption_tokens=st.integers(1, 400),
    image_side=st.integers(16, 4000),
)
machines = st.builds(
    Machine,
    cores=st.integers(1, 256),
    memory=st.integers(2 * GIB, 2000 * GIB),
    gpu_memory=st.one_of(st.just(()), st.lists(st.integers(4 * GIB, 140 * GIB), min_size=1, max_size=8).map(tuple)),
    bf16=st.booleans(),
    processes=st.sampled_from([1, 2, 3, 4, 8]),
    machines=st.sampled_from([1, 1, 2, 3]),
)
starts = st.builds(
    Start,
    name=st.just("runs/before"),
    trained=st.booleans(),
    parameters=st.integers(100_000, 1_000_000_000),
)


def values(choices: list[Choice]) -> dict[str, object]:
    return {choice.key: choice.value for choice in choices}


def config_of(choices: list[Choice], **pinned: object) -> Config:
    tree: dict[str, object] = {}
    chosen = values(choices) | {"run_dir": "run", "data.train": "x.tar"} | pinned
    for key, value in chosen.items():
        set_key(tree, key, value)
    return parse_config(tree, "test")


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_pretrained_tower_keeps_its_weights(tower: str) -> None:
    """A tower whose pretrained weights are named gets the rate of a pretrained model; the other one that of scratch."""
    known, machine = Pairs(50_000, 20, 224), Machine(cores=8, memory=32 * GIB)
    pinned: dict[str, object] = {"vision": {"model.vision.pretrained": "x"}, "text": {"model.text.name": "x"}}[tower]
    plain, found = (values(choose(known, machine, None, given)) for given in ({}, pinned))
    whole = values(choose(known, machine, Start("x", True, 150_000_000), {"data.batch_size": plain["data.batch_size"]}))
    other = {"vision": "text", "text": "vision"}[tower]
    assert found["optim.lr"] == plain["optim.lr"]
    assert found[f"optim.{tower}_lr"] == whole["optim.lr"]
    assert f"optim.{other}_lr" not in found


@settings(max_examples=200)
@given(pairs, machines, st.one_of(st.none(), starts))
def test_every_choice_is_a_setting_with_a_reason(known: Pairs, machine: Machine, start: Start | None) -> None:
    """All keys exist, are unique and have a one-line reason. Together they are a valid configuration: the batch divides
    by the processes, and the micro-batch is smaller than the batch of a process."""
    found = choose(known, machine, start)
    assert len(values(found)) == len(found)
    assert {choice.key for choice in found} - set(known_keys(Config)) == {"data.views.main"} & set(values(found))
    assert all(choice.why and "\n" not in choice.why for choice in found)
    config = config_of(found)
    world_size = machine.processes * machine.machines
    assert config.data.batch_size % world_size == 0
    micro = config.train.micro_batch
    assert micro in (None, "auto") or 1 <= int(micro) < config.data.batch_size // world_size


@given(pairs, machines, st.integers(1, 10_000))
def test_batches_divide_by_lanes_that_are_pinned(known: Pairs, machine: Machine, lanes: int) -> None:
    """The chosen batch is a multiple of the lanes and of the processes of all machines, and an epoch has at
    least four steps where possible."""
    batch = values(choose(known, machine, pinned={"data.lanes": lanes}))["data.batch_size"]
    unit = math.lcm(lanes, machine.processes * machine.machines)
    assert isinstance(batch, int)
    assert batch % unit == 0
    assert batch == unit or batch * 4 <= known.count


@given(pairs, st.integers(1, 1000), machines, st.one_of(st.none(), starts))
def test_more_pairs_mean_larger_batches_and_fewer_passes(
    known: Pairs, times: int, machine: Machine, start: Start | None
) -> None:
    """Batch and input never fall with the number of pairs, epochs never rise; towers never shrink."""
    more = Pairs(known.count * times, known.caption_tokens, known.image_side)
    few, many = values(choose(known, machine, start)), values(choose(more, machine, start))
    assert int(str(many["data.batch_size"])) >= int(str(few["data.batch_size"]))
    assert float(str(many["train.epochs"])) <= float(str(few["train.epochs"]))
    assert choose_towers(more, machine).parameters >= choose_towers(known, machine).parameters


@given(pairs, machines, st.integers(1, 1_000_000))
def test_micro_batches_lie_within_the_memory(known: Pairs, machine: Machine, batch: int) -> None:
    """Weights, optimizer and activations of a micro-batch fit into the memory of a process, unless a single pair does
    not; twice as many pairs would not fit, or are not needed."""
    found = values(choose(known, machine, pinned={"data.batch_size": batch}))
    towers, rows = choose_towers(known, machine), batch // (machine.processes * machine.machines)
    per_pair = towers.pair_bytes(towers.side(known), max_tokens(known))
    room = FILL * (machine.memory_per_process - BYTES_PER_PARAMETER * towers.parameters)
    micro = found["train.micro_batch"]
    held = rows if micro is None else int(str(micro))
    assert held <= 1 or held * per_pair <= room
    assert micro is None or 2 * held * per_pair > room or 2 * held > rows


@given(pairs, machines, st.sampled_from([64, 256, 1024]))
def test_the_learning_rate_follows_the_square_root_of_the_batch(known: Pairs, machine: Machine, batch: int) -> None:
    """Four times the batch doubles it, within its two digits, also for a pinned batch."""
    rates = [values(choose(known, machine, pinned={"data.batch_size": b}))["optim.lr"] for b in (batch, 4 * batch)]
    assert float(str(rates[1])) / float(str(rates[0])) == pytest.approx(2, rel=0.08)


def test_large_towers_are_for_gpus_and_many_pairs() -> None:
    """A CPU gets the small ones whatever the pairs; on a GPU each comes at its number of pairs; all are open_clip's or
    timm's, and the text tower has room for every token."""
    cpu, gpu = Machine(2, 16 * GIB), Machine(16, 128 * GIB, (80 * GIB,), True)
    for towers in TOWERS:
        known = Pairs(max(8, towers.least_pairs), 300, 224)
        assert choose_towers(known, gpu) is towers
        assert choose_towers(known, cpu) is TOWERS[0]
        assert towers.setting("model.vision.name").startswith(("timm:", "open_clip:"))
        config = config_of(choose(known, gpu)).model.text
        assert config.config is not None
        assert config.config["max_position_embeddings"] >= config.max_tokens == 128


T4 = Machine(4, 16 * GIB, (15 * GIB,), bf16=False)
EIGHT = Machine(128, 1000 * GIB, (80 * GIB,) * 8, bf16=True, processes=8)


@pytest.mark.parametrize(
    ("machine", "count", "expected"),
    [
        # One older GPU, half a million pairs: 0.7 * (15 GiB - 60 M * 16 bytes) / (87 MB + 24 tokens * 0.21 MB) = 115.
        (
            T4,
            500_000,
            {
                "model.vision.name": "timm:resnet50",
                "model.vision.image_size": 224,
                "data.batch_size": 1024,
                "train.micro_batch": 64,
                "train.precision": "fp16",
                "train.epochs": 32,
                "optim.lr": 1e-3,
                "data.workers": 2,
            },
        ),
        # Eight new ones, ten million pairs: 512 pairs each, of which 1,391 would fit.
        (
            EIGHT,
            10_000_000,
            {
                "model.vision.name": "open_clip:ViT-B-32",
                "data.batch_size": 4096,
                "train.micro_batch": None,
                "train.precision": "bf16",
                "train.epochs": 32,
                "optim.lr": 5e-4,
                "data.workers": 8,
            },
        ),
        # Few pairs get the small towers on any GPU, and as many passes as on a CPU.
        (
            EIGHT,
            1_000,
            {
                "model.vision.name": "timm:resnet10t",
                "data.batch_size": 128,
                "train.micro_batch": None,
                "train.epochs": 100,
                "optim.lr": 1.5e-3,
            },
        ),
    ],
    ids=["one T4", "eight GPUs", "few pairs"],
)
def test_choices_for_gpus(machine: Machine, count: int, expected: dict[str, object]) -> None:
    """Values worked out by hand from the rules in docs/python.md."""
    found = values(choose(Pairs(count, 20, 300), machine))
    assert {key: found[key] for key in expected} == expected


def test_the_smallest_gpu_decides() -> None:
    """The micro-batch follows the smallest GPU, as all GPUs hold equally many pairs."""
    known = Pairs(500_000, 20, 300)
    mixed = Machine(64, 500 * GIB, (80 * GIB, 24 * GIB), bf16=True, processes=2)
    alike = Machine(64, 500 * GIB, (24 * GIB, 24 * GIB), bf16=True, processes=2)
    assert values(choose(known, mixed)) == values(choose(known, alike))
    larger = Machine(64, 500 * GIB, (80 * GIB, 80 * GIB), bf16=True, processes=2)
    assert values(choose(known, mixed)) != values(choose(known, larger))


@pytest.mark.parametrize(("parameters", "count", "batch"), [(150_000_000, 1_000_000, 512), (150_000_000, 1_000, 128)])
def test_a_start_on_a_gpu(parameters: int, count: int, batch: int) -> None:
    """Up to 512 pairs per step with a learning rate for that batch, a measured micro-batch, and at most ten epochs."""
    found = values(choose(Pairs(count, 20, 300), T4, Start("open_clip:ViT-B-32/x", True, parameters)))
    assert found["data.batch_size"] == batch
    assert found["train.micro_batch"] == "auto"
    assert found["optim.lr"] == pytest.approx(1e-5 * math.sqrt(batch / 256), rel=0.05)
    assert found["train.epochs"] == (1 if count == 1_000_000 else 10)


@pytest.mark.parametrize(
    ("on_gpu", "bf16", "precision"),
    [(False, False, "fp32"), (False, True, "bf16"), (True, True, "bf16"), (True, False, "fp16")],
)
def test_precision_follows_the_hardware(on_gpu: bool, bf16: bool, precision: str) -> None:
    """bf16 where it is in hardware, fp16 on older GPUs, fp32 on older CPUs."""
    machine = Machine(8, 32 * GIB, (24 * GIB,) if on_gpu else (), bf16)
    assert values(choose(Pairs(1000, 16, 224), machine))["train.precision"] == precision


def test_a_trained_start_is_changed_slowly() -> None:
    """A large pretrained model gets a lower peak than random weights and, with few pairs, keeps all but its last
    layers; with more pairs, a small model, or pinned locks or adapters, nothing is locked."""
    machine, few, many = Machine(8, 32 * GIB), Pairs(200, 16, 224), Pairs(100_000, 16, 224)
    trained = Start("open_clip:ViT-B-32/x", True, 150_000_000)
    found = values(choose(few, machine, trained))
    assert found["model.vision.lock"] is found["model.text.lock"] is True
    assert float(str(found["optim.lr"])) < float(str(values(choose(few, machine))["optim.lr"]))
    assert not any("lock" in key for key in values(choose(many, machine, trained)))
    assert not any("lock" in key for key in values(choose(few, machine, Start("runs/x", True, 2_000_000))))
    pinned = values(choose(few, machine, trained, {"model.vision.lora.rank": 4, "model.text.lock": False}))
    assert not any("lock" in key for key in pinned)
    config_of(choose(few, machine, trained, {"model.vision.lora.rank": 4}), **{"model.vision.lora.rank": 4})


@pytest.mark.parametrize(
    ("key", "value", "gone"),
    [
        ("train.steps", 10, ["train.epochs"]),
        ("train.minutes", 1.0, ["train.epochs"]),
        ("data.batch_size", 48, ["data.batch_size"]),
        (
            "model.vision.name",
            "timm:resnet18",
            ["model.vision.name", "model.vision.options", "model.vision.image_size"],
        ),
        ("model.text.tokenizer", "clip", ["model.text.tokenizer", "model.text.vocab_size"]),
        ("model.text.name", "folder", ["model.text.config", "model.text.pooling", "model.text.tokenizer"]),
        ("optim.lr", 1e-3, ["optim.lr"]),
        ("data.views", {"main": {}}, ["data.views.main"]),
    ],
)
def test_pinned_settings_are_not_chosen(key: str, value: object, gone: list[str]) -> None:
    """A pinned setting and those that depend on it are not chosen; the others still form a valid configuration."""
    machine, known = Machine(2, 16 * GIB, (), True), Pairs(1000, 16, 64)
    free, pinned = choose(known, machine), choose(known, machine, pinned={key: value})
    assert not set(gone) & set(values(pinned))
    assert set(gone) <= set(values(free)) or key == "train.steps"
    config_of(pinned, **{key: value})


def test_unknown_towers_are_measured() -> None:
    """Where towers or objectives are pinned or come from a model, the micro-batch is measured."""
    machine, known = Machine(2, 16 * GIB), Pairs(1000, 16, 64)
    for key in ("model.vision.name", "model.text.config", "objectives.mlm.weight"):
        assert values(choose(known, machine, pinned={key: None}))["train.micro_batch"] == "auto"
    assert values(choose(known, machine, Start("runs/x", True, 10)))["train.micro_batch"] == "auto"
    assert values(choose(known, machine))["train.micro_batch"] is None


def test_a_run_of_chosen_length_keeps_its_best_step() -> None:
    """Twelve evaluations and early stopping are chosen with the length, unless nothing is held out or one of the three
    is given."""
    prepared = Prepared("a", 4_000, "b", 40, "", packed=False)
    chosen = [Choice("train.epochs", 50, ""), Choice("data.batch_size", 128, "")]
    found = values(selection(prepared, chosen, {}))
    assert found["evaluate.every"] == 50 * 4_000 // 128 // 12
    assert found["train.early_stopping"] == {"patience": 4}
    assert not selection(replace(prepared, held_out=None), chosen, {})
    assert not selection(prepared, chosen[1:], {"train.steps": 5})
    assert not selection(prepared, chosen, {"evaluate.every": 5})
    assert not selection(prepared, chosen, {"train.early_stopping": None})
