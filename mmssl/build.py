"""From a configuration to objects: the one room that does this."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from pydantic import ValidationError

from mmssl import system
from mmssl.config import Config, ModelConfig, ObjectiveConfig, ViewConfig
from mmssl.data import TrainLoader, iter_samples, resolve_sources
from mmssl.data.shards import Progress, SampleLimits
from mmssl.data.storage import Access
from mmssl.data.transforms import Renderer, Tokenizer, captions, load_tokenizer, train_tokenizer, views
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.inference.model import load
from mmssl.models.dual_encoder import DualEncoder, build_dual_encoder
from mmssl.models.lora import add_adapters
from mmssl.objectives import find_objective
from mmssl.objectives._base import Objective, ObjectiveOptions, Vocabulary
from mmssl.objectives._task import TrainingTask

TOKENIZER_CAPTIONS = 1_000_000
"""A tokenizer is learnt from the first so many captions."""


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


def resolve(config: Config) -> Config:
    """The configuration with every objective's own options written out, and the towers of what the model starts from.

    Raises:
        UserError: an unknown objective or option, or a start that cannot be had.
    """
    dumped = {name: options.model_dump(mode="json") for name, options in objective_options(config).items()}
    entries = {name: ObjectiveConfig.model_validate(options) for name, options in dumped.items()}
    return config.model_copy(update={"objectives": entries, "model": _resolve_start(config.model)})


def _resolve_start(model: ModelConfig) -> ModelConfig:
    """The towers of `model.start`, locked as told. Those of a run that goes on are written out already."""
    if model.start is None or model.text.name != model.start:
        return model
    kept = {"lock", "unlocked_layers", "lora"}
    given = [f"vision.{name}" for name in model.vision.model_fields_set - kept]
    given += [f"text.{name}" for name in model.text.model_fields_set - kept - {"name", "max_tokens"}]
    if given:
        raise UserError(f"model.{min(given)} cannot be set beside model.start={model.start}, which brings its towers")
    source = load(model.start)
    found = source.self_contained()
    vision = found.vision.model_copy(update={name: getattr(model.vision, name) for name in kept})
    chosen = {name: getattr(model.text, name) for name in model.text.model_fields_set & {*kept, "max_tokens"}}
    text = found.text.model_copy(update={"tokenizer": source.config.text.tokenizer, **chosen})
    return found.model_copy(update={"start": model.start, "vision": vision, "text": text})


def train_tokenizer_on(shards: Sequence[str], templates: Sequence[str], vocab_size: int, max_tokens: int) -> Tokenizer:
    """A tokenizer learnt from every caption template of the samples in full, in file order."""
    rendered = (captions.render_caption(s.fields, [t], None) for s in iter_samples(shards) for t in templates)
    return train_tokenizer(islice(rendered, TOKENIZER_CAPTIONS), vocab_size, max_tokens)


def build_tokenizer(config: Config, learnt: Path) -> Tokenizer:
    """The text tower's tokenizer; one to be learnt is read from `learnt` if it is there, else learnt from the captions.

    Raises:
        UserError: there is no usable tokenizer.
    """
    text = config.model.text
    source = text.tokenizer or text.name
    assert source is not None
    if learnt.is_dir() and (source == "train" or config.model.start is not None):
        return load_tokenizer(str(learnt), text.max_tokens)
    if source != "train":
        return load_tokenizer(source, text.max_tokens)
    shards = [shard for source in resolve_sources(config.data.train, config.data.allow_pipe) for shard in source.shards]
    return train_tokenizer_on(shards, config.data.captions, text.vocab_size, text.max_tokens)


def build_encoder(config: Config, tokenizer: Tokenizer, say: Callable[[str], None] | None = None) -> DualEncoder:
    """The dual encoder of a resolved configuration, with the weights that it starts from, and with its adapters.

    Args:
        say: told, a line each, which weights of `model.start` were taken over and which were left out.

    Raises:
        UserError: a tower cannot be built, or what to start from cannot be had.
    """
    encoder = build_dual_encoder(config.model, tokenizer.vocab_size, tokenizer.pad_id)
    if config.model.start is not None:
        source = load(config.model.start)
        encoder.load_state_dict(source.encoder.state_dict())
        if say is not None:
            for note in source.notes:
                say(f"model.start={config.model.start}: {note}")
    add_adapters(encoder, config.model)
    return encoder


def describe_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """What objectives need to know of a tokenizer."""
    special = tuple(tokenizer.special_ids)
    return Vocabulary(tokenizer.vocab_size, tokenizer.mask_id, special, tokenizer.continues_word, tokenizer.max_tokens)


def placeholder_vocabulary(size: int, max_tokens: int) -> Vocabulary:
    """Stands for a vocabulary that is still to be learnt, to count weights with."""
    return Vocabulary(size, 4, tuple(range(5)), torch.zeros(size, dtype=torch.bool), max_tokens)


def build_objectives(
    options: Mapping[str, ObjectiveOptions], encoder: DualEncoder, vocabulary: Vocabulary
) -> dict[str, Objective]:
    """Each configured objective with its heads.

    Raises:
        UserError: an objective cannot run on these towers.
    """
    return {name: find_objective(name)(entry, encoder, vocabulary) for name, entry in options.items()}


def build_task(config: Config, encoder: DualEncoder, tokenizer: Tokenizer, world: World) -> TrainingTask:
    """The dual encoder with the configured objectives."""
    return TrainingTask(
        encoder, build_objectives(objective_options(config), encoder, describe_vocabulary(tokenizer)), world
    )


def build_views(config: Config, task: TrainingTask) -> dict[str, ViewConfig]:
    """Every rendering that training needs: the configured ones and those the objectives ask for."""
    asked = {k: v for name in task.objectives for k, v in task.objective(name).views().items()}
    return {**asked, **config.data.views}


def build_loader(
    config: Config, task: TrainingTask, tokenizer: Tokenizer, bad_samples: Path, progress: Progress | None = None
) -> TrainLoader:
    """The training stream of this process.

    Raises:
        UserError: shards are missing or unusable, or the batch does not fit them.
    """
    data, world = config.data, task.world
    size, interpolation = task.encoder.vision.image_size, config.model.vision.interpolation
    renderings = {
        name: views.View(view, size, data.decode, data.max_pixels, interpolation)
        for name, view in build_views(config, task).items()
    }
    on_gpu = task.encoder.log_logit_scale.device.type != "cpu"
    later = data.augment_on == "device" or (data.augment_on == "auto" and on_gpu)
    return TrainLoader(
        resolve_sources(data.train, data.allow_pipe),
        seed=config.seed,
        batch_size=data.batch_size,
        render=Renderer(renderings, data.captions, config.seed, data.max_caption_chars, augment_on_device=later),
        tokenize=tokenizer.encode,
        lanes=data.lanes,
        shuffle_block=data.shuffle_block,
        slice_mib=data.slice_mib,
        rank=world.rank,
        world_size=world.size,
        workers=data.workers if data.workers is not None else default_workers(),
        worker_kind=data.worker_kind,
        limits=SampleLimits(max_member_bytes=int(data.max_member_mib * 2**20)),
        access=Access(cache_dir=data.cache_dir, cache_bytes=int(data.cache_gib * 2**30)),
        max_bad_fraction=data.bad_samples,
        bad_log=bad_samples,
        pin_memory=torch.cuda.is_available(),
        index_progress=progress,
    )


def default_workers() -> int:
    """Half of this process's share of the cores, 1 to 16: decoding shares them with the training step."""
    return min(16, max(1, len(system.allowed_cores()) // system.local_world_size() // 2))
