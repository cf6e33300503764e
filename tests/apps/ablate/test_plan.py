"""The mixes of an ablation, and its runs of equal compute, checked before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmssl.apps.ablate.mixes import check_names, default_mixes, read_plan_file, request_mixes, slug
from mmssl.apps.ablate.plan import AblationPlan, Budget, make_plan
from mmssl.apps.ablate.scheduler import make_slots
from mmssl.config import Config, ObjectiveConfig, dump_config, parse_config
from mmssl.errors import UserError
from tests.helpers.tiny_runs import run_tree, write_pairs

OBJECTIVES = {"contrastive": {}, "mlm": {"weight": 0.1}}


CONFIGURED = {
    "mae": ObjectiveConfig(weight=0.1, mask_ratio=0.5),
    "contrastive": ObjectiveConfig(),
    "mlm": ObjectiveConfig(weight=0.2),
    "siglip": ObjectiveConfig(weight=0),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 small images in two tars."""
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def config(shards: Path, **changes: Any) -> Config:
    return parse_config(run_tree(shards, Path("unused"), objectives=OBJECTIVES, **changes), "test")


def plan(
    settings: Config, out: Path, budget: Budget, mixes: tuple[str, ...] = (), seeds: tuple[int, ...] = (0, 1)
) -> AblationPlan:
    return make_plan(settings, request_mixes(mixes, settings.objectives), seeds, budget, out, None)


def test_equal_flops_give_costlier_mixes_fewer_steps(shards: Path, tmp_path: Path) -> None:
    """Steps times their mean cost is the baseline's within half a step, with and without a schedule."""
    mixes = ("contrastive", "contrastive+mlm", "contrastive+mlm(start=0.5,every=3)")
    made = plan(config(shards, train__steps=1000), tmp_path, Budget("flops"), mixes)
    steps = [planned.runs[0].config.train.steps for planned in made.mixes]
    assert steps[0] == 1000
    assert steps[1] is not None
    assert steps[2] is not None
    assert steps[1] < steps[2] < 1000
    for planned, count in zip(made.mixes, steps, strict=True):
        assert count is not None
        assert abs(count * planned.cost - 1000 * made.mixes[0].cost) <= 0.5 * planned.cost


def test_equal_minutes_differ_in_objectives_only(shards: Path, tmp_path: Path) -> None:
    """Runs of one seed share everything but objectives and folder; those of a mix everything but seed and folder;
    the whole baseline runs beside the others of its seed."""
    made = plan(config(shards), tmp_path, Budget("minutes", 2.5))
    assert [c.name for c in made.runs] == [
        "contrastive-seed0",
        "contrastive+mlm-seed0",
        "contrastive-seed1",
        "contrastive+mlm-seed1",
    ]
    trees = [yaml.safe_load(dump_config(c.config)) for c in made.runs]
    assert all(t["train"]["minutes"] == 2.5 and t["train"]["steps"] is None for t in trees)
    assert {*trees[0]["objectives"]} == {"contrastive"}
    assert trees[1]["objectives"]["mlm"]["weight"] == 0.1
    for a, b, may_differ in ((0, 1, {"objectives", "run_dir"}), (0, 2, {"seed", "run_dir"})):
        assert {k for k in trees[a] if trees[a][k] != trees[b][k]} == may_differ


def test_diagnostics_run_only_where_configured(shards: Path, tmp_path: Path) -> None:
    """Diagnostics take longer with more objectives, so they are off unless the configuration sets their interval."""
    for mixer, watched in (({}, None), ({"watch_steps": 7}, 7)):
        made = plan(config(shards, mixer=mixer), tmp_path, Budget("minutes", 1))
        assert made.runs[0].config.mixer.watch_steps == watched
        assert made.runs[0].config.mixer.image_steps is None


def test_runs_made_with_other_settings_are_refused(shards: Path, tmp_path: Path) -> None:
    """The setting that changed is named with both values; other seeds and mixes may be added."""
    made = plan(config(shards), tmp_path, Budget("minutes", 1))
    for run in made.runs:
        run.run_dir.mkdir(parents=True)
        made.settings(run).parent.mkdir(exist_ok=True)
        made.settings(run).write_text(dump_config(run.config))
    plan(config(shards), tmp_path, Budget("minutes", 1), ("contrastive", "mlm"), (1, 2))
    with pytest.raises(UserError, match=r"train.minutes=1.0, now it is 2.0.*--out"):
        plan(config(shards), tmp_path, Budget("minutes", 2))
    with pytest.raises(UserError, match=r"optim.lr=0.002, now it is 0.1"):
        plan(config(shards, optim__lr=0.1), tmp_path, Budget("minutes", 1))


def test_equal_flops_need_a_length_in_steps(shards: Path, tmp_path: Path) -> None:
    """Samples count as steps; minutes cannot say how many operations the baseline gets."""
    made = plan(config(shards, train={"samples": 100}), tmp_path, Budget("flops"))
    assert made.mixes[0].runs[0].config.train.steps == 13
    with pytest.raises(UserError, match="train.steps or train.samples"):
        plan(config(shards, train={"minutes": 1}), tmp_path, Budget("flops"))


@pytest.mark.parametrize(
    ("changes", "mixes", "seeds", "words"),
    [
        ({}, (), (0,), "at least 2 seeds"),
        ({}, (), (1, 1, 2), "repeats a seed"),
        ({"evaluate": {}}, (), (0, 1), "evaluate.suites is empty"),
        ({}, ("contrastive", "contrastive+mlm(wieght=1)"), (0, 1), "objectives.mlm.wieght"),
        ({"data__train": "none-*.tar"}, (), (0, 1), "none-*.tar"),
    ],
)
def test_what_would_fail_after_hours_is_refused_at_once(
    changes: dict[str, Any], mixes: tuple[str, ...], seeds: tuple[int, ...], words: str, shards: Path, tmp_path: Path
) -> None:
    """One line, and nothing is written."""
    out = tmp_path / "out"
    with pytest.raises(UserError) as caught:
        plan(config(shards, **changes), out, Budget("minutes", 1), mixes, seeds)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_jobs_share_the_machine() -> None:
    """Each job has cores of its own, and the GPUs in turn; one job has all cores."""
    (alone,) = make_slots(None, [], [3, 1, 2])
    assert (alone.cores, alone.gpu) == ((1, 2, 3), None)
    pair = make_slots(2, [], [0, 1, 2, 3, 4])
    assert [s.cores for s in pair] == [(0, 1), (2, 3)]
    on_gpus = make_slots(None, ["2", "5"], range(8))
    assert [(s.gpu, s.cores) for s in on_gpus] == [("2", (0, 1, 2, 3)), ("5", (4, 5, 6, 7))]
    assert [s.gpu for s in make_slots(3, ["0", "1"], range(8))] == ["0", "1", "0"]
    with pytest.raises(UserError, match="--jobs 3"):
        make_slots(3, [], [0, 1])


def test_default_mixes_start_with_contrastive_alone() -> None:
    """Contrastive, with each other objective that has a weight, and all; `all` is left out where it says nothing."""
    assert default_mixes(CONFIGURED) == ["contrastive", "contrastive+mae", "contrastive+mlm", "all"]
    assert default_mixes({"mlm": ObjectiveConfig(), "siglip": ObjectiveConfig()}) == ["siglip", "siglip+mlm"]
    assert default_mixes({"mlm": ObjectiveConfig(), "mae": ObjectiveConfig()}) == ["mlm", "mlm+mae"]


def test_a_mix_names_a_folder() -> None:
    """What no file system dislikes."""
    assert (
        slug("contrastive+mlm(weight=0.05,every=2)+mae(ratio=[1,2])")
        == "contrastive+mlm_weight=0.05_every=2_+mae_ratio=_1_2"
    )


@pytest.mark.parametrize(
    ("mixes", "words"),
    [
        (["contrastive"], ["at least two"]),
        (["contrastive", " contrastive"], ["same name"]),
    ],
)
def test_mixes_that_cannot_be_compared_are_refused(mixes: list[str], words: list[str]) -> None:
    """The message names the mix, what is wrong and what to write."""
    with pytest.raises(UserError) as caught:
        check_names(request_mixes(mixes, CONFIGURED))
    assert [w for w in words if w not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_a_plan_file_gives_each_mix_its_settings(shards: Path, tmp_path: Path) -> None:
    """Runs of the mix differ from the baseline's in those keys, its objectives and its folder only, and equal epochs
    are the length of all. Options of an objective that the file changes reach the mix."""
    path = tmp_path / "plan.yaml"
    path.write_text(
        "plain: contrastive\n"
        "with words: {mix: contrastive+mlm, settings: {optim.lr: 0.01}}\n"
        "smooth: {mix: contrastive, settings: {objectives.contrastive.label_smoothing: 0.1}}\n"
    )
    settings = config(shards)
    made = make_plan(settings, read_plan_file(path), (0, 1), Budget("epochs", 30), tmp_path / "out", None)
    assert [run.name for run in made.runs[:3]] == ["plain-seed0", "with_words-seed0", "smooth-seed0"]
    plain, words, smooth = (yaml.safe_load(dump_config(run.config)) for run in made.runs[:3])
    assert all(tree["train"]["epochs"] == 30 and tree["train"]["steps"] is None for tree in (plain, words, smooth))
    assert {key for key in plain if plain[key] != words[key]} == {"objectives", "run_dir", "optim"}
    assert (words["optim"]["lr"], set(words["objectives"])) == (0.01, {"contrastive", "mlm"})
    assert smooth["objectives"]["contrastive"] == plain["objectives"]["contrastive"] | {"label_smoothing": 0.1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: contrastive\nb: {mix: contrastive, setting: {}}", "'b' is not of the form"),
        ("a: contrastive\nb: [contrastive]", "'b' is not of the form"),
        ("a: contrastive\nb: {settings: {seed: 1}}", "'b' is not of the form"),
        ("a: contrastive\nb: {mix: contrastive, settings: {optim.lrr: 1}}", "mix 'b': unknown key 'optim.lrr'"),
        ("a: contrastive\nb: {mix: contrastive, settings: {data.train: none-*.tar}}", "none-*.tar"),
        ("a: contrastive\nb: contrastive+nothing", "nothing"),
        ("- contrastive", "mapping"),
    ],
)
def test_a_wrong_plan_file_is_refused(text: str, words: str, shards: Path, tmp_path: Path) -> None:
    """One line that names the mix, before anything runs."""
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        make_plan(config(shards), read_plan_file(path), (0, 1), Budget("epochs", 2), tmp_path / "out", None)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
