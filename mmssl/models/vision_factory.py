"""Vision towers by their names in open_clip and timm."""

import contextlib
import difflib
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmssl.config import VisionConfig
from mmssl.errors import UserError, one_line
from mmssl.models.vision import PatchSelect, VisionTower, open_clip_class

_TINY_TEXT = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}


def build_vision(config: VisionConfig, embed_dim: int) -> tuple[VisionTower, Tensor | None]:
    """The vision tower of a configuration, and its pretrained projection [embed_dim, width] if any.

    Raises:
        UserError: unknown library, model or option, or weights that do not fit.
    """
    library, _, name = config.name.partition(":")
    if library == "open_clip" and name:
        tower, projection = _open_clip_tower(config, name, embed_dim)
    elif library == "timm" and name:
        tower, projection = _timm_tower(config, name), None
    else:
        raise UserError(
            f"model.vision.name={config.name!r}: write open_clip:MODEL or timm:MODEL, e.g. open_clip:ViT-B-32"
        )
    if projection is not None and projection.shape[0] != embed_dim:
        raise UserError(
            f"model.embed_dim={embed_dim}, but the weights of {config.name} project to {projection.shape[0]}; "
            f"set model.embed_dim={projection.shape[0]}"
        )
    if config.lock:
        tower.lock(config.unlocked_layers)
    return tower, projection


def _open_clip_tower(config: VisionConfig, name: str, embed_dim: int) -> tuple[VisionTower, Tensor | None]:
    import open_clip

    known = open_clip.get_model_config(name)
    if known is None:
        raise UserError("model.vision.name: " + unknown_model("open_clip", name, open_clip.list_models()))
    check_quick_gelu(name, config.pretrained)
    vision = {**known["vision_cfg"], **config.options}
    if config.image_size is not None:
        vision["image_size"] = config.image_size
    overrides: dict[str, Any] = {"vision_cfg": vision}
    if config.pretrained is None:
        # Only the visual tower is kept: a tiny text tower keeps random weights cheap and needs no hub.
        overrides |= {"embed_dim": embed_dim, "text_cfg": _TINY_TEXT}
    try:
        with quiet(config.pretrained is None):
            model = open_clip.create_model(name, pretrained=config.pretrained, pretrained_text=False, **overrides)
            if config.image_size is not None and hasattr(getattr(model.visual, "trunk", None), "set_input_size"):
                # open_clip builds timm's trunks at the size of their name.
                model.visual.set_input_size(config.image_size)
    except Exception as error:  # libraries raise many kinds on options that do not fit together
        raise UserError(f"model.vision: open_clip could not build {name!r}: {one_line(error)}") from error
    preprocessing = model.visual.preprocess_cfg
    mean, std = config.mean or preprocessing["mean"], config.std or preprocessing["std"]
    tower, projection = wrap_trunk(model.visual, mean, std)
    if tower.projects and tower.width != embed_dim:
        raise UserError(
            f"model.embed_dim={embed_dim}, but {config.name} projects to {tower.width}; set "
            f"model.embed_dim={tower.width}"
        )
    return tower, projection if config.pretrained is not None else None


def check_quick_gelu(name: str, tag: str | None) -> None:
    """Refuse an open_clip architecture with weights that were trained with another activation.

    Raises:
        UserError: names the architecture that fits.
    """
    import open_clip

    trained = (open_clip.get_pretrained_cfg(name, tag) if tag else {}).get("quick_gelu", None)
    built = bool((open_clip.get_model_config(name) or {}).get("quick_gelu", False))
    if trained is None or bool(trained) == built:
        return
    other = f"{name}-quickgelu" if trained else name.removesuffix("-quickgelu")
    raise UserError(
        f"open_clip's {name}/{tag} was trained {'with' if trained else 'without'} QuickGELU, unlike {name}; use {other}"
    )


def wrap_trunk(visual: Any, mean: Any, std: Any) -> tuple[VisionTower, Tensor | None]:
    """Turn an open_clip model's `visual` into a tower, and return its projection [embed_dim, width].

    A `visual` without a projection pools into the shared space itself. Then the tower projects, or the projection is
    the identity.
    """
    side = square(visual.image_size, "open_clip's image size")
    if isinstance(visual, open_clip_class("transformer", "VisionTransformer")):
        projection, visual.proj = visual.proj, None
        visual.output_tokens = True
        own = visual.patch_dropout
        visual.patch_dropout = PatchSelect(1, None if isinstance(own, nn.Identity) else own)
        return VisionTower(visual, side, mean, std), None if projection is None else projection.detach().T
    if isinstance(visual, open_clip_class("timm_model", "TimmModel")):
        head = dict(visual.head.named_children())
        if not head or (set(head) == {"drop", "proj"} and head["proj"].bias is None):
            # Without a head of open_clip's, timm's own classifier is the projection.
            projects = not head and not isinstance(visual.trunk.get_classifier(), nn.Identity)
            tower = VisionTower(_with_patch_select(visual.trunk), side, mean, std, projects=projects)
            if projects:
                return tower, None
            # SigLIP's tower has no projection: its pooled vector is already in the shared space.
            return tower, head["proj"].weight.detach() if head else torch.eye(tower.width)
    return VisionTower(visual, side, mean, std, projects=True), None


def square(size: Any, key: str) -> int:
    """The side of a square size, given as a number or as two equal ones.

    Raises:
        UserError: the size is not square.
    """
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    if len(sides) != 1 or not isinstance(next(iter(sides)), int):
        raise UserError(f"{key}={size}: images are square here; give one number as model.vision.image_size")
    return int(sides.pop())


def _timm_tower(config: VisionConfig, name: str) -> VisionTower:
    import timm

    options = dict(config.options)
    file = config.pretrained if config.pretrained is not None and Path(config.pretrained).is_file() else None
    if config.pretrained is not None and file is None:
        name = f"{name}.{config.pretrained}" if config.pretrained != "true" else name
    if not timm.is_model(name.partition(".")[0]):
        raise UserError("model.vision.name: " + unknown_model("timm", name, timm.list_models()))
    if options.get("in_chans", 3) != 3:
        raise UserError(f"model.vision.options.in_chans={options['in_chans']}: images have 3 channels here; remove it")
    if "img_size" in options:
        options["img_size"] = square(options["img_size"], "model.vision.options.img_size")
        if config.image_size not in (None, options["img_size"]):
            raise UserError(
                f"model.vision.image_size={config.image_size} and model.vision.options.img_size={options['img_size']} "
                f"differ; remove the option"
            )
    try:
        trunk = _create_timm(name, config, options, file is None)
    except Exception as error:  # libraries raise many kinds on options that do not fit together
        raise UserError(f"model.vision: timm could not build {name!r}: {one_line(error)}") from error
    if file is not None:
        _load_weights(trunk, _read_weights(Path(file)), where=file)
    settings = trunk.pretrained_cfg
    side = options.get("img_size") or config.image_size or square(settings["input_size"][1:], f"the size of {name}")
    mean, std = config.mean or settings["mean"], config.std or settings["std"]
    return VisionTower(_with_patch_select(trunk), side, mean, std)


def _create_timm(name: str, config: VisionConfig, options: dict[str, Any], pretrained: bool) -> Any:
    import timm

    arguments = {"num_classes": 0, **options}
    with_size = arguments if config.image_size is None else {**arguments, "img_size": config.image_size}
    create = partial(timm.create_model, name, pretrained=pretrained and config.pretrained is not None)
    problem = ""
    # Convolutional towers accept any size and do not have the argument. Some factories refuse what they set themselves.
    for attempt in (create, partial(_override_timm, name, create.keywords["pretrained"])):
        for tried in (with_size, arguments):
            try:
                return attempt(**tried)
            except TypeError as error:
                problem = str(error)
                if "img_size" not in problem:
                    break
        if "multiple values for keyword" not in problem:
            break
    raise TypeError(problem)


def _override_timm(name: str, pretrained: bool, **arguments: Any) -> Any:
    """A timm model whose factory sets some of the given arguments itself, and would be given them twice.

    The factory runs without the arguments; those it then passes on to timm's builder are replaced.
    """
    import timm

    base, tag = timm.models.split_model_name_tag(name)
    factory: Any = timm.models.model_entrypoint(base)
    inner = [n for n in factory.__code__.co_names if n.startswith("_create_") and n in factory.__globals__]
    if len(inner) != 1:
        raise TypeError(f"its options {', '.join(sorted(arguments))} cannot be changed")
    build = factory.__globals__[inner[0]]

    def overriding(*positional: Any, **fixed: Any) -> Any:
        return build(*positional, **{**fixed, **arguments})

    copied = FunctionType(factory.__code__, {**factory.__globals__, inner[0]: overriding}, base)
    model = copied(pretrained=pretrained, pretrained_cfg=tag or None)
    # As timm.create_model, which its exports read.
    model._model_args = {**getattr(model, "_model_args", {}), **arguments}
    return model


def _with_patch_select(trunk: Any) -> Any:
    """The trunk with our selection in place of its patch dropout, which stays active in training."""
    from timm.layers import PatchDropoutWithIndices

    own = getattr(trunk, "patch_drop", trunk)
    if own is not trunk and hasattr(trunk, "num_prefix_tokens"):
        # The trunks that have no such module without a rate are those that expect the kept patches too.
        with_indices = own is None or isinstance(own, PatchDropoutWithIndices)
        trunk.patch_drop = PatchSelect(trunk.num_prefix_tokens, own, with_indices)
    return trunk


@contextlib.contextmanager
def quiet(on: bool) -> Iterator[None]:
    """Silence open_clip, which warns on the root logger about random weights."""
    logging.disable(logging.WARNING if on else logging.NOTSET)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def unknown_model(library: str, name: str, known: list[str]) -> str:
    """Error message for an unknown model name, with similar names."""
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.3)
    return f"{library} has no model {name!r}; similar names: {', '.join(near) or 'none'}"


def _read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a safetensors file or a torch file, read without running code from it.

    Raises:
        UserError: no weights can be read from the file.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} has no weights that can be read safely: {one_line(error)}") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} is not a state dict (names -> tensors)")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _load_weights(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a complete state dict; extra weights, such as a classifier head, are ignored.

    Raises:
        UserError: weights are missing, or have another shape; names the first ones.
    """
    own = module.state_dict()
    missing = [k for k in own if k not in state]
    shapes = [
        f"{k} {tuple(state[k].shape)} against {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or shapes:
        raise UserError(
            f"{where} does not fit the tower: {len(own) - len(missing) - len(shapes)} of {len(own)} weights match; "
            f"missing: {', '.join(missing[:3]) or 'none'}; other shape: {', '.join(shapes[:2]) or 'none'}"
        )
    module.load_state_dict({k: state[k] for k in own})
