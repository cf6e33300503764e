"""From a configuration to objects: the one room that does this."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from pydantic import ValidationError

from mmssl.config import Config, ObjectiveConfig, SourceConfig, ViewConfig
from mmssl.data.captions import render_caption
from mmssl.data.loader import TrainStream
from mmssl.data.patterns import expand
from mmssl.data.reader import iter_samples
from mmssl.data.render import Renderer
from mmssl.data.tokens import Tokenizer, load_tokenizer, train_tokenizer
from mmssl.data.views import View
from mmssl.distributed import Processes
from mmssl.models.dual_encoder import DualEncoder, build_dual_encoder
from mmssl.objectives import find_objective
from mmssl.objectives.base import Objective, Vocabulary
from mmssl.objectives.mixer import Mixer
from mmssl.types import UserError

TOKENIZER_CAPTIONS = 1_000_000
"""A tokenizer is learnt from the first so many captions."""


def objective_options(config: Config) -> dict[str, ObjectiveConfig]:
    """Each objective's entry as its own typed options.

    Raises:
        UserError: an unknown objective or option.
    """
    options = {}
    for name, entry in config.objectives.items():
        kind = find_objective(name).Options
        try:
            options[name] = kind.model_validate(entry.model_dump())
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(["objectives", name, *map(str, problem["loc"])])
            known = ", ".join(kind.model_fields)
            raise UserError(f"'{key}': {problem['msg'].lower()}; options of {name}: {known}") from None
    return options


def training_sources(config: Config) -> list[SourceConfig]:
    """The weighted sources of `data.train`."""
    train = config.data.train
    entries = [train] if isinstance(train, str) else train
    plain = [entry for entry in entries if isinstance(entry, str)]
    weighted = [entry for entry in entries if isinstance(entry, SourceConfig)]
    return ([SourceConfig(shards=plain, weight=1.0)] if plain else []) + weighted


def training_shards(config: Config) -> list[list[str]]:
    """The shards of each source.

    Raises:
        UserError: a pattern matches nothing or a shard is missing.
    """
    return [expand(source.shards, allow_pipe=config.data.allow_pipe) for source in training_sources(config)]


def learn_tokenizer(shards: Sequence[str], templates: Sequence[str], vocab_size: int, max_tokens: int) -> Tokenizer:
    """A tokenizer learnt from every caption template of the samples in full, in file order."""
    captions = (render_caption(s.fields, [t], None) for s in iter_samples(shards) for t in templates)
    return train_tokenizer(islice(captions, TOKENIZER_CAPTIONS), vocab_size, max_tokens)


def build_tokenizer(config: Config, learnt: Path) -> Tokenizer:
    """The text tower's tokenizer; one to be learnt is read from `learnt` if it is there, else learnt from the captions.

    Raises:
        UserError: there is no usable tokenizer.
    """
    text = config.model.text
    source = text.tokenizer or text.name
    assert source is not None
    if source != "train":
        return load_tokenizer(source, text.max_tokens)
    if learnt.is_dir():
        return load_tokenizer(str(learnt), text.max_tokens)
    shards = [shard for source in training_shards(config) for shard in source]
    return learn_tokenizer(shards, config.data.captions, text.vocab_size, text.max_tokens)


def build_encoder(config: Config, tokenizer: Tokenizer) -> DualEncoder:
    """The dual encoder of a configuration."""
    return build_dual_encoder(config.model, tokenizer.vocab_size, tokenizer.pad_id)


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """What objectives need to know of a tokenizer."""
    return Vocabulary(tokenizer.vocab_size, tokenizer.mask_id, tuple(tokenizer.special_ids), tokenizer.continues_word)


def unlearnt_vocabulary(size: int) -> Vocabulary:
    """Stands for a vocabulary that is still to be learnt, to count weights with."""
    return Vocabulary(size, 4, tuple(range(5)), torch.zeros(size, dtype=torch.bool))


def build_objectives(
    options: Mapping[str, ObjectiveConfig], encoder: DualEncoder, vocabulary: Vocabulary
) -> dict[str, Objective]:
    """Each configured objective with its heads.

    Raises:
        UserError: an objective cannot run on these towers.
    """
    return {name: find_objective(name)(entry, encoder, vocabulary) for name, entry in options.items()}


def build_mixer(config: Config, encoder: DualEncoder, tokenizer: Tokenizer, processes: Processes) -> Mixer:
    """The dual encoder with the configured objectives."""
    return Mixer(encoder, build_objectives(objective_options(config), encoder, vocabulary_of(tokenizer)), processes)


def build_views(config: Config, mixer: Mixer) -> dict[str, ViewConfig]:
    """Every rendering that training needs: the configured ones and those the objectives ask for."""
    asked = {k: v for name in mixer.objectives for k, v in mixer.objective(name).views().items()}
    return {**asked, **config.data.views}


def build_stream(config: Config, mixer: Mixer, tokenizer: Tokenizer, bad_samples: Path) -> TrainStream:
    """The training stream of this process."""
    data, processes = config.data, mixer.processes
    size = mixer.encoder.vision.image_size
    views = {name: View(view, size, mode=data.decode, max_pixels=data.max_pixels) for name, view in build_views(config, mixer).items()}
    return TrainStream(
        training_shards(config),
        weights=[source.weight for source in training_sources(config)],
        seed=config.seed,
        data=data,
        rank=processes.rank,
        world=processes.world,
        render=Renderer(views, data.captions, config.seed),
        tokenize=tokenizer.encode,
        bad_samples=bad_samples,
    )
