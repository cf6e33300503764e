"""The only module that turns a configuration into objects: the plan of a run, and the parts built from it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from pydantic import ValidationError

from mmssl import system
from mmssl.config import Config, DataConfig, HoldOutConfig, ModelConfig, ObjectiveConfig, SuiteConfig, ViewConfig
from mmssl.data import ChooseBatching, LoaderConfig, MemberNames, Source, TrainLoader, resolve_sources
from mmssl.data.order import Batching, DistinctValues, PlannedSource
from mmssl.data.shards import SampleLimits, ShardIndex
from mmssl.data.sources import distinct_values, iter_captions
from mmssl.data.storage import Access, iter_samples
from mmssl.data.transforms import Renderer, Tokenizer, captions, load_tokenizer, train_tokenizer, views
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.evaluate import datasets, open_dataset
from mmssl.evaluate.tasks import find_task
from mmssl.inference import Model, load
from mmssl.models import DualEncoder, build_dual_encoder, lora
from mmssl.objectives import Objective, ObjectiveOptions, TrainingTask, base, find_objective, mixing

_log = logging.getLogger(__name__)
_PEEK = 100
"""Samples of each source in which fields are looked for."""


@dataclass(frozen=True)
class RunPlan:
    """A run, resolved and checked once. Everything a run is made of is built from parts of its plan."""

    config: Config
    """With every option of the objectives written out, and with the towers of `model.start`."""
    sources: list[Source]
    """The training shards, patterns expanded."""
    objectives: dict[str, ObjectiveOptions]
    """Objective name -> its schedule and its own options, typed."""
    suites: dict[str, tuple[datasets.Dataset, list[str]]]
    """Name -> an opened evaluation dataset and the tasks to run on it."""


def resolve(config: Config) -> RunPlan:
    """Check everything that needs no model and no device, and write out what follows from it.

    Raises:
        UserError: an unknown objective, option or task, schedules that leave steps without an objective, a bad start
            model, or missing shards or evaluation datasets.
    """
    config, objectives = complete_config(config)
    check_schedules(objectives)
    sources = resolve_sources(config.data.train, config.data.allow_pipe)
    suites = {name: (_open_suite(name, entry), entry.task) for name, entry in config.evaluate.suites.items()}
    check_metrics(config, evaluation_names(suites))
    return RunPlan(config, sources, objectives, suites)


def evaluation_names(suites: Mapping[str, tuple[datasets.Dataset, Sequence[str]]]) -> list[str]:
    """SUITE/TASK of every evaluation, in their order."""
    return [f"{name}/{find_task(task).name}" for name, (_, tasks) in suites.items() for task in tasks]


def check_metrics(config: Config, known: Sequence[str]) -> None:
    """Refuse metrics of evaluations that the run does not have.

    Raises:
        UserError: names the evaluations.
    """
    best = config.best_metric
    if best is not None and best.rpartition("/")[0] not in known:
        key = "evaluate.best" if config.evaluate.best is not None else "train.early_stopping.metric"
        raise UserError(
            f"{key}={best!r} names no evaluation of this run; give SUITE/TASK/METRIC with one of: "
            f"{', '.join(known) or 'none, as evaluate.suites is empty'}"
        )
    guard = config.train.guard
    if guard is not None and guard.metric is not None:
        tasks = [name.removeprefix(f"{guard.suite}/") for name in known if name.startswith(f"{guard.suite}/")]
        if guard.metric.rpartition("/")[0] not in tasks:
            raise UserError(
                f"train.guard.metric={guard.metric!r} names no task of the suite {guard.suite}; give TASK/METRIC with "
                f"one of: {', '.join(tasks)}"
            )


def _open_suite(name: str, entry: SuiteConfig) -> datasets.Dataset:
    """The dataset of a suite, which has what its tasks need."""
    try:
        tasks = [find_task(task) for task in entry.task]
    except UserError as error:
        raise UserError(f"evaluate.suites.{name}.task: {error}") from None
    dataset = open_dataset(entry.data, name=name, slice_by=entry.slice_by)
    for task in tasks:
        task.ready(dataset)
    return dataset


def complete_config(config: Config) -> tuple[Config, dict[str, ObjectiveOptions]]:
    """The configuration with every objective's options and the towers of `model.start` written out; needs no data.

    Returns: the configuration, and each objective's typed options.

    Raises:
        UserError: an unknown objective or option, or a bad start model.
    """
    options = objective_options(config)
    entries = {name: ObjectiveConfig.model_validate(typed.model_dump(mode="json")) for name, typed in options.items()}
    return config.model_copy(update={"objectives": entries, "model": _resolve_start(config.model)}), options


def objective_options(config: Config) -> dict[str, ObjectiveOptions]:
    """Each objective's entry as its own typed options.

    Raises:
        UserError: an unknown objective or option.
    """
    options = {}
    for name, entry in config.objectives.items():
        kind = find_objective(name).Options
        try:
            options[name] = kind.model_validate(entry.model_dump(exclude_unset=True))
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(["objectives", name, *map(str, problem["loc"])])
            known = ", ".join(kind.model_fields)
            raise UserError(f"'{key}': {problem['msg'].lower()}; options of {name}: {known}") from None
    return options


def check_schedules(objectives: Mapping[str, ObjectiveConfig]) -> None:
    """Refuse schedules with steps at which no objective acts.

    Raises:
        UserError: names the first such point of the training.
    """
    gap = mixing.first_gap(objectives.values())
    if gap is not None:
        raise UserError(
            f"objectives: after {gap:.0%} of the training there are steps at which none acts; let one act from start=0 "
            f"to end=1 without ramp and every, for example contrastive"
        )


def _resolve_start(model: ModelConfig) -> ModelConfig:
    """The configuration with the towers of `model.start`, unless they are written out already."""
    if not model.needs_towers:
        return model
    kept = {"lock", "unlocked_layers", "lora"}
    given = [f"vision.{name}" for name in model.vision.model_fields_set - kept]
    given += [f"text.{name}" for name in model.text.model_fields_set - kept - {"max_tokens"}]
    if given:
        raise UserError(f"model.{min(given)} cannot be set beside model.start={model.start}, which brings its towers")
    longest = model.text.max_tokens if "max_tokens" in model.text.model_fields_set else None
    source = _load_start(model, longest)
    found = source.self_contained()
    vision = found.vision.model_copy(update={name: getattr(model.vision, name) for name in kept})
    chosen = {name: getattr(model.text, name) for name in model.text.model_fields_set & {*kept, "max_tokens"}}
    text = found.text.model_copy(update={"tokenizer": source.config.text.tokenizer, **chosen})
    return found.model_copy(update={"start": model.start, "vision": vision, "text": text})


def _load_start(model: ModelConfig, longest: int | None) -> Model:
    """The model of `model.start`, its text positions stretched if captions may be longer than they are."""
    assert model.start is not None
    source = load(model.start)
    if longest is not None and (source.text.positions or longest) < longest:
        source.text.stretch(longest)
    return source


def build_limits(data: DataConfig) -> SampleLimits:
    """Limits and names of members of the training shards."""
    members = MemberNames.of(data.members.image, data.members.caption)
    return SampleLimits(int(data.max_member_mib * 2**20), members, data.images)


def build_access(data: DataConfig) -> Access:
    """Reading of the training shards, with the cache.

    Raises:
        UserError: the folder of the cache cannot be created.
    """
    cache = data.cache
    if cache.dir is None:
        return Access()
    return Access.keeping(cache.dir, int(cache.gib * 2**30), cache.resize, build_limits(data), data.max_pixels)


def train_tokenizer_on(
    shards: Sequence[str],
    templates: Sequence[str],
    vocab_size: int,
    max_tokens: int,
    *,
    lowercase: bool = True,
    limits: SampleLimits | None = None,
    held_out: HoldOutConfig | None = None,
) -> Tokenizer:
    """A tokenizer trained on every caption template of the samples but those `held_out`, in file order."""
    return train_tokenizer(
        iter_captions(shards, templates, limits, held_out), vocab_size, max_tokens, lowercase=lowercase
    )


def build_tokenizer(plan: RunPlan, folder: Path) -> Tokenizer:
    """The text tower's tokenizer. One to be trained is read from `folder` if it is there, else trained on the captions.

    Raises:
        UserError: the tokenizer cannot be loaded or trained.
    """
    config, text = plan.config, plan.config.model.text
    source = text.tokenizer or text.name
    assert source is not None
    if folder.is_dir() and (source == "train" or config.model.start is not None):
        return load_tokenizer(str(folder), text.max_tokens)
    if source != "train":
        return load_tokenizer(source, text.max_tokens)
    shards = [shard for source in plan.sources for shard in source.shards]
    return train_tokenizer_on(
        shards,
        list(config.data.captions),
        text.vocab_size,
        text.max_tokens,
        lowercase=text.lowercase,
        limits=build_limits(config.data),
        held_out=config.data.hold_out,
    )


def build_encoder(config: Config, tokenizer: Tokenizer, say: Callable[[str], None] | None = None) -> DualEncoder:
    """The dual encoder of a completed configuration, with its start weights and adapters.

    Args:
        say: gets a line for each note on the weights loaded from `model.start`.

    Raises:
        UserError: a tower cannot be built, or the start model cannot be loaded.
    """
    encoder = build_dual_encoder(config.model, tokenizer.vocab_size, tokenizer.pad_id)
    if config.model.start is not None:
        source = _load_start(config.model, config.model.text.max_tokens)
        encoder.text.stretched_from = source.text.stretched_from
        encoder.load_state_dict(source.encoder.state_dict())
        if say is not None:
            for note in source.notes:
                say(f"model.start={config.model.start}: {note}")
    if say is not None and encoder.text.stretched_from is not None:
        say(
            f"model.text.max_tokens={config.model.text.max_tokens}: the {encoder.text.stretched_from} positions of the "
            f"text tower are stretched to {encoder.text.positions}; short captions keep their vectors"
        )
    lora.add_adapters(encoder, config.model)
    return encoder


def describe_vocabulary(tokenizer: Tokenizer) -> base.Vocabulary:
    """The facts about a tokenizer that objectives need."""
    special = tuple(tokenizer.special_ids)
    return base.Vocabulary(
        tokenizer.vocab_size, tokenizer.mask_id, special, tokenizer.continues_word, tokenizer.max_tokens
    )


def placeholder_vocabulary(size: int, max_tokens: int) -> base.Vocabulary:
    """A stand-in for a vocabulary that is not trained yet, to count weights with."""
    return base.Vocabulary(size, 4, tuple(range(5)), torch.zeros(size, dtype=torch.bool), max_tokens)


def build_objectives(
    options: Mapping[str, ObjectiveOptions], encoder: DualEncoder, vocabulary: base.Vocabulary
) -> dict[str, Objective]:
    """Each configured objective with its heads.

    Raises:
        UserError: an objective cannot run on these towers.
    """
    return {name: find_objective(name)(entry, encoder, vocabulary) for name, entry in options.items()}


def build_task(
    options: Mapping[str, ObjectiveOptions], encoder: DualEncoder, tokenizer: Tokenizer, world: World
) -> TrainingTask:
    """The dual encoder with these objectives."""
    return TrainingTask(encoder, build_objectives(options, encoder, describe_vocabulary(tokenizer)), world)


def build_views(config: Config, task: TrainingTask) -> dict[str, ViewConfig]:
    """Every view that training needs: the configured ones and those the objectives ask for.

    A main view at another size that is the main view's own is left out.

    Raises:
        UserError: an objective reads images, and `data.images` is false.
    """
    if not config.data.images:
        _check_texts_only(task)
        return {}
    main, own = config.data.views["main"], _own_size(config, task)
    required = {name: asked for name, asked in task.required_views().items() if asked != own}
    views_of = {k: main if isinstance(v, base.Resized) else v for k, v in required.items()}
    further = dict.fromkeys(mixing.further_views(task.objective(name) for name in task.names), main)
    return {**views_of, **config.data.views, **further}


def _check_texts_only(task: TrainingTask) -> None:
    for name in task.names:
        objective = task.objective(name)
        if objective.views() or any(forward.tower == "vision" for forward in objective.required_passes()):
            raise UserError(
                f"data.images=false, but objectives.{name} reads images; set data.images=true, or leave {name} out"
            )


def _own_size(config: Config, task: TrainingTask) -> base.Resized:
    return base.Resized(task.encoder.vision.image_size, config.model.vision.interpolation)


def build_groups(plan: RunPlan, task: TrainingTask) -> list[str]:
    """The fields of samples by which objectives group them.

    Raises:
        UserError: the first samples of all sources lack such a field, or images to be sorted.
    """
    limits, found, most = build_limits(plan.config.data), set[str](), 1
    made = captions.CAPTION_GROUP, captions.IMAGE_ORDER
    wanted = list(dict.fromkeys(field for name in task.names for field in task.objective(name).groups()))
    for source in plan.sources if set(wanted) - {captions.CAPTION_GROUP} else ():
        for sample in islice(iter_samples(source.shards, limits), _PEEK):
            found.update(sample.fields)
            most = max(most, 1 + len(sample.more_images))
    for name in task.names:
        objective = task.objective(name)
        if captions.IMAGE_ORDER in objective.groups() and objective.images() > most:
            raise UserError(
                f"objectives.{name} sorts {objective.images()} images of a sample, but the first {_PEEK} samples of "
                f"the shards have at most {most}; lower its count, or pack several images per sample (KEY.0.jpg, "
                f"KEY.1.jpg, or several image columns)"
            )
        missing = [f for f in objective.groups() if f not in (*made, *found)]
        if missing:
            known = ", ".join(sorted(found - {"txt"})) or "none"
            raise UserError(
                f"objectives.{name}.positives={missing[0]!r} names a field that the first {_PEEK} samples of the "
                f"shards lack; use caption, diagonal or one of theirs: {known}"
            )
    return wanted


def build_batching(plan: RunPlan, world: World, say: Callable[[str], None]) -> ChooseBatching | None:
    """The choice of the samples that share a batch; None if chance decides.

    Args:
        say: gets lines about the choice.

    Raises:
        UserError: it cannot be made for several sources.
    """
    data, batching = plan.config.data, plan.config.data.batching

    def groups(source: PlannedSource, indexes: Sequence[ShardIndex]) -> Batching:
        from mmssl.inference import neighbours  # most runs do without

        assert batching.neighbours is not None
        folder, most = batching.neighbours, data.bad_samples
        find = neighbours.neighbour_groups
        return find(folder, batching.group, source, indexes, most_lacking=most, world=world, say=say)

    def values(source: PlannedSource, indexes: Sequence[ShardIndex]) -> Batching:
        assert batching.distinct is not None
        found = DistinctValues(distinct_values(indexes, batching.distinct, list(data.captions)), data.batch_size)
        say(f"data.batching.distinct={batching.distinct}: {found.describe()}")
        return found

    if batching.neighbours is not None:
        return groups
    if batching.distinct is None:
        return None
    if len(plan.sources) > 1:
        raise UserError(
            "data.batching.distinct works with one source, and data.train has several with weights; give their "
            "patterns as one list without weights"
        )
    return values


def build_loader(
    plan: RunPlan, task: TrainingTask, tokenizer: Tokenizer, bad_samples: Path, say: Callable[[str], None] = _log.info
) -> TrainLoader:
    """The training batches of this process.

    Args:
        bad_samples: log of the samples that could not be used.
        say: gets lines about the choice of the samples that share a batch.

    Raises:
        UserError: shards are missing or unusable, or the batch does not fit them.
    """
    config, data, world = plan.config, plan.config.data, task.world
    renderings = _renderings(config, task)
    _check_resize(data, renderings)
    on_gpu = task.encoder.log_logit_scale.device.type != "cpu"
    on_device = data.augment_on == "device" or (data.augment_on == "auto" and on_gpu)
    options = LoaderConfig(
        seed=config.seed,
        batch_size=data.batch_size,
        lanes=data.lanes,
        shuffle_block=data.shuffle_block,
        slice_mib=data.slice_mib,
        rank=world.rank,
        world_size=world.size,
        workers=data.workers if data.workers is not None else default_workers(),
        worker_kind=data.worker_kind,
        batching=build_batching(plan, world, say),
        hold_out=data.hold_out,
        limits=build_limits(data),
        access=build_access(data),
        max_bad_fraction=data.bad_samples,
        bad_log=bad_samples,
        pin_memory=torch.cuda.is_available(),
    )
    groups = build_groups(plan, task)
    caption_count = mixing.caption_count(task.objective(name) for name in task.names)
    makers = (task.objective(name).sample_inputs() for name in task.names)
    extras = [(maker.template, maker) for maker in makers if maker is not None]
    renderer = Renderer(
        renderings,
        data.captions,
        config.seed,
        data.max_caption_chars,
        on_device,
        groups,
        caption_count,
        list(dict.fromkeys(template for template, _ in extras if template is not None)),
    )
    return TrainLoader(plan.sources, options, renderer, tokenizer.encode, extras=extras)


def _renderings(config: Config, task: TrainingTask) -> dict[str, views.View]:
    """Each view of training at the size that its reader needs."""
    data, required = config.data, task.required_views()
    own, found = _own_size(config, task), {}
    for name, view in build_views(config, task).items():
        asked = required.get(name)
        size = asked if isinstance(asked, base.Resized) else own
        like = None if size is own or name in data.views else "main"
        found[name] = views.View(view, size.image_size, data.decode, data.max_pixels, size.interpolation, like)
    return found


def _check_resize(data: DataConfig, renderings: Mapping[str, views.View]) -> None:
    """Refuse to shrink images below the size of a view."""
    if not renderings:
        return
    name, view = max(renderings.items(), key=lambda item: item[1].image_size)
    if data.cache.resize is not None and data.cache.resize < view.image_size:
        raise UserError(
            f"data.cache.resize={data.cache.resize} is less than the {view.image_size} px of the view {name!r}, which "
            f"would be blurred; give at least {view.image_size}, better twice as much"
        )


def default_workers() -> int:
    """Half of this process's share of the cores, 1 to 16: decoding shares them with the training step."""
    return min(16, max(1, len(system.allowed_cores()) // system.local_world_size() // 2))
