"""The configuration: one YAML file and `key=value` overrides become one frozen, typed `Config`.

Runtime values (device, rank, number of samples) never live here; they are passed where things are built.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mmssl.types import UserError


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SourceConfig(Section):
    """One source of a mixture."""

    shards: str | list[str]
    """A path, URL or pattern (`a/{00000..00009}.tar`, `a/*.tar`), or a list of them."""
    weight: float = Field(1.0, gt=0)
    """Share of the batch relative to the other sources' weights."""


class ViewConfig(Section):
    """How one named rendering of a picture is made while training. The defaults are OpenCLIP's."""

    changed: float = Field(1.0, ge=0, le=1)
    """Part of the pictures that may get any of the changes below but crop and flip; the others stay close to
    what is judged."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest area of the random resized crop, as a fraction of the picture."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Smallest and largest width/height of the crop."""
    flip: float = Field(0.0, ge=0, le=1)
    """Probability of a horizontal flip."""
    affine: float = Field(0.0, ge=0, le=1)
    """Probability of a small random rotation, translation and scaling."""
    affine_degrees: float = Field(15.0, ge=0, le=180)
    """Largest rotation of `affine`, in degrees."""
    affine_scale: tuple[float, float] = (0.9, 1.1)
    """Smallest and largest scale of `affine`."""
    affine_fill: Literal["mirror", "white"] = "mirror"
    """What `affine` brings into sight from outside the picture."""
    color_jitter: float = Field(0.0, ge=0, le=1)
    """Probability of changing brightness, contrast, saturation and hue."""
    color_jitter_strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Largest relative change of brightness, contrast and saturation, and largest shift of hue (in turns)."""
    gray: float = Field(0.0, ge=0, le=1)
    """Probability of dropping the colours."""
    invert: float = Field(0.0, ge=0, le=1)
    """Probability of the negative."""
    solarize: float = Field(0.0, ge=0, le=1)
    """Probability of inverting the pixels above one half."""
    posterize: float = Field(0.0, ge=0, le=1)
    """Probability of keeping 3 to 6 levels a colour."""
    outline: float = Field(0.0, ge=0, le=1)
    """Probability of darkening the edges of shapes, as a drawing with outlines."""
    blur: float = Field(0.0, ge=0, le=1)
    """Probability of a Gaussian blur with a sigma of 0.1 to 2 pixels at 224 px (scaled with the size)."""
    erase: float = Field(0.0, ge=0, le=1)
    """Probability of painting over one random rectangle of 2 to 20 % of the area."""


class DataConfig(Section):
    """Where samples come from and how they are rendered."""

    train: str | list[str | SourceConfig]
    """Training shards: a pattern, or a list of patterns and weighted sources."""
    batch_size: int = Field(256, ge=1)
    """Pairs a step over all processes."""
    captions: list[str] = ["{txt}"]
    """Caption templates; each sample draws one. `{txt}` is the .txt member, other fields come from the .json member.
    A list field such as `{tags}` renders a random non-empty subset in random order."""
    lanes: int | None = Field(None, ge=1)
    """Parallel readers of the stream, fixed for a run; they divide the batch. Default: the largest divisor
    of the batch up to 64."""
    shuffle_block: int = Field(8, ge=1)
    """How much a lane shuffles together, in units of 8 MiB (or of a slice, if that is larger); more costs memory and
    mixes better."""
    slice_mib: float | None = Field(None, gt=0)
    """Contiguous bytes of one shard read together, at most. Default: single samples for small sets, a millionth of
    larger ones, 4 to 8 MiB for remote ones."""
    workers: int | None = Field(None, ge=0)
    """Readers and decoders per process; 0 decodes in the training thread. Default: from the number of cores."""
    worker_kind: Literal["thread", "process"] = "thread"
    """Threads share memory and start at once; processes keep Python's lock away from the training loop."""
    decode: Literal["quality", "fast"] = "quality"
    """`fast` decodes JPEG at a reduced DCT size where the crop allows it (30-33 dB against the full decode)."""
    views: dict[str, ViewConfig] = {"main": ViewConfig()}
    """Named renderings. `main` feeds the contrastive objective; the objectives in use say which others they need."""
    augment_on: Literal["auto", "host", "device"] = "auto"
    """Where pictures are flipped and changed: by the workers, one at a time (`host`), or in batches where the model is.
    The draws, and but for rounding the pictures, are the same. `auto`: on the device if it is a GPU."""
    max_pixels: int = Field(178_956_970, ge=1)
    """Pictures with more pixels are refused before they are decoded (Pillow's own threshold)."""
    max_member_mib: float = Field(64.0, gt=0)
    """Members larger than this are refused."""
    max_caption_chars: int = Field(20_000, ge=1)
    """Longer captions are refused."""
    bad_samples: float = Field(0.01, ge=0, le=1)
    """The run stops when a larger fraction of the samples so far (after the first 1,000), or 100 in a row,
    could not be used."""
    cache_dir: Path | None = None
    """Folder that keeps what was read of remote shards."""
    cache_gib: float = Field(100.0, gt=0)
    """Size cap of the cache; the pieces used longest ago go first."""
    allow_pipe: bool = False
    """Allow `pipe:COMMAND` sources, which run COMMAND in a shell."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.lanes is not None and self.batch_size % self.lanes:
            raise ValueError(
                f"data.lanes={self.lanes} does not divide data.batch_size={self.batch_size}; pick a divisor"
            )
        if "main" not in self.views:
            raise ValueError("data.views has no view named 'main'; the contrastive objective reads it: add one")
        if not self.captions:
            raise ValueError("data.captions is empty; give at least one template, for example ['{txt}']")
        return self


class LoraConfig(Section):
    """Low-rank adapters of one tower (Hu et al. 2022): its own weights stay, only the adapters are trained."""

    rank: int = Field(8, ge=1)
    """Rank of each layer's change."""
    alpha: int = Field(16, ge=1)
    """The change is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an entry of an adapter's input."""
    targets: list[str] | None = Field(None, min_length=1)
    """Layers to adapt, by the ends of their names (`[qkv, mlp.fc1]`). Default: all linear layers, or in a tower without
    any all ungrouped convolutions."""


class VisionConfig(Section):
    """The vision tower."""

    name: str = "open_clip:ViT-B-32"
    """`open_clip:MODEL` (the visual tower of an open_clip config) or `timm:MODEL`."""
    pretrained: str | None = None
    """A pretrained tag of the library, or a local weights file. Null: random weights."""
    image_size: int | None = Field(None, ge=8)
    """Side of the square input in pixels. Default: the model's own."""
    options: dict[str, Any] = {}
    """Further arguments of the model (timm: keyword arguments such as depth; open_clip: entries of vision_cfg)."""
    mean: tuple[float, float, float] | None = None
    """Mean of red, green and blue, from 0 to 1. Default: what the weights were trained with."""
    std: tuple[float, float, float] | None = None
    """Deviation of red, green and blue, from 0 to 1. Default: what the weights were trained with."""
    fit: Literal["shortest", "squash"] = "shortest"
    """How pictures are judged: the shorter side resized and the centre cut out, or both sides resized."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How pictures are resized."""
    lock: bool = False
    """Freeze the tower (LiT); its batch norms keep their statistics."""
    unlocked_layers: int = Field(0, ge=0)
    """With `lock`: the last layers left free."""
    lora: LoraConfig | None = None
    """Train low-rank adapters in place of the tower's own weights. Needs `pip install 'mmssl[lora]'`."""

    @model_validator(mode="after")
    def _check(self) -> "VisionConfig":
        _no_free_layers("vision", self.lora, self.unlocked_layers)
        return self


class TextConfig(Section):
    """The text tower."""

    name: str | None = None
    """A Hugging Face encoder: a hub name or a local folder with weights and tokenizer."""
    config: dict[str, Any] | None = None
    """A Hugging Face configuration (`model_type: bert`, ...) to build random weights from, instead of `name`; with
    `model_type: open_clip` the entries of open_clip's text_cfg."""
    tokenizer: str | None = None
    """A hub name, a folder with a fast tokenizer, `clip` for OpenAI's CLIP tokenizer, or `train` to learn one from the
    training captions. Default: `name`."""
    vocab_size: int = Field(8192, ge=64)
    """Largest vocabulary of a tokenizer learnt here (`tokenizer: train`)."""
    pooling: Literal["auto", "cls", "mean", "eos", "pooler"] = "auto"
    """Which token vectors make the caption's vector. `auto`: what the folder says (sentence-transformers), else cls.
    `pooler`: the vector that the encoder pools by itself."""
    max_tokens: int = Field(77, ge=4)
    """Captions are cut to this many tokens and padded to the longest of the batch only."""
    lock: bool = False
    """Freeze the tower."""
    unlocked_layers: int = Field(0, ge=0)
    """With `lock`: the last layers left free."""
    lora: LoraConfig | None = None
    """Train low-rank adapters in place of the tower's own weights. Needs `pip install 'mmssl[lora]'`."""

    @model_validator(mode="after")
    def _check(self) -> "TextConfig":
        _no_free_layers("text", self.lora, self.unlocked_layers)
        if (self.name is None) == (self.config is None):
            raise ValueError("model.text needs exactly one of `name` (pretrained) and `config` (random weights)")
        if self.name is None and self.tokenizer is None:
            raise ValueError("model.text.tokenizer is missing; give a folder or hub name, or 'train' to learn one")
        return self


def _no_free_layers(tower: str, lora: LoraConfig | None, unlocked_layers: int) -> None:
    if lora is not None and unlocked_layers > 0:
        raise ValueError(
            f"model.{tower}.lora trains adapters only, so model.{tower}.unlocked_layers={unlocked_layers} cannot be; "
            f"set one of them to its default"
        )


class ModelConfig(Section):
    """The dual encoder."""

    start: str | None = None
    """A whole model to start from: its towers, weights, tokenizer and preprocessing. A run or a model folder,
    `open_clip:MODEL/TAG`, `local-dir:FOLDER` or a Hugging Face CLIP folder. Of the towers, only `lock`,
    `unlocked_layers`, `lora` and `text.max_tokens` can then be set."""
    vision: VisionConfig = VisionConfig()
    """The vision tower."""
    text: TextConfig
    """The text tower."""
    embed_dim: int = Field(512, ge=1)
    """Size of the shared space."""
    projection: Literal["linear", "mlp"] = "linear"
    """From a tower's width to the shared space."""
    init_temperature: float = Field(0.07, gt=0)
    """Start of the learnable temperature (CLIP: 0.07); its inverse is the logit scale."""
    max_logit_scale: float = Field(100.0, gt=0)
    """The logit scale is clamped here."""

    @model_validator(mode="before")
    @classmethod
    def _towers_of_start(cls, values: Any) -> Any:
        """Without a text tower of its own, a model has that of what it starts from."""
        if isinstance(values, dict) and values.get("start") is not None:
            text = values.get("text") or {}
            if isinstance(text, dict) and text.get("name") is None and text.get("config") is None:
                values = {**values, "text": {**text, "name": values["start"]}}
        return values


class ObjectiveConfig(BaseModel):
    """When and how strongly one objective acts; its own options stand beside these and are checked by the objective."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    weight: float = Field(1.0, ge=0)
    """Factor of its loss in the total."""
    start: float = Field(0.0, ge=0, le=1)
    """Part of the training after which it acts."""
    end: float = Field(1.0, ge=0, le=1)
    """Part of the training after which it acts no more."""
    ramp: float = Field(0.0, ge=0, le=1)
    """Part of the training over which its weight rises linearly from 0 after `start`."""
    every: int = Field(1, ge=1)
    """It acts on every k-th step only."""


class MixerConfig(Section):
    """How objectives are balanced, and how often it is looked at what they do."""

    balance: Literal["fixed", "uncertainty", "gradient_norm"] = "fixed"
    """`fixed`: the weights as given. Experimental: `uncertainty` (times the inverse of each running loss) and
    `gradient_norm` (each gradient brought to the contrastive one's norm)."""
    watch_steps: int | None = Field(100, ge=1)
    """Measure each objective's gradient norm, its cosine with the contrastive gradient and its share of the time every
    so many steps, on 64 samples. Null: never."""
    picture_steps: int | None = Field(200, ge=1)
    """Write what objectives reconstruct to RUN/pictures every so many steps. Null: never."""

    @model_validator(mode="after")
    def _check(self) -> "MixerConfig":
        if self.balance == "gradient_norm" and self.watch_steps is None:
            raise ValueError("mixer.balance=gradient_norm measures gradients: set mixer.watch_steps, for example 100")
        return self


class OptimConfig(Section):
    """The optimizer and the learning-rate schedule. The defaults are OpenCLIP's."""

    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr: float = Field(5e-4, gt=0)
    """Peak learning rate."""
    vision_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the vision tower. Default: `lr`."""
    text_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the text tower. Default: `lr`."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's betas."""
    eps: float = Field(1e-6, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.2, ge=0)
    """Decoupled weight decay; none on biases, norms, embeddings of position and class, and the temperature."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After the warm-up: cosine to `final_lr`, constant, or constant and then a linear decay (warm-up,
    stable, decay)."""
    warmup: float = Field(0.05, ge=0)
    """Linear warm-up: a fraction of the training below 1, else a number of steps."""
    decay: float = Field(0.2, gt=0, le=1)
    """Length of wsd's decay, as a fraction of the training."""
    final_lr: float = Field(0.0, ge=0, le=1)
    """Learning rate at the end, relative to the peak."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the whole gradient."""


class TrainConfig(Section):
    """Length, precision and safety of the training loop."""

    steps: int | None = Field(None, ge=1)
    """Length in optimizer steps."""
    epochs: float | None = Field(None, gt=0)
    """Length in passes over the data."""
    samples: int | None = Field(None, ge=1)
    """Length in samples seen."""
    minutes: float | None = Field(None, gt=0)
    """Length in minutes of wall clock; the schedule follows the clock."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the forward pass."""
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Pairs a process holds activations for at a time (the gradient stays that of the whole batch). `auto`: as many
    as fit into the memory that is free. Default: all."""
    exchange: Literal["gather", "ring"] = "gather"
    """How processes show each other their features: `gather` gives each process all of them; with `ring` they go round
    part by part, for batches whose features would fill a device."""
    compile: bool = False
    """Compile both towers with torch.compile; captions of any length share one program."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, which is then evaluated and exported. Null: none."""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Save every so many steps."""
    checkpoint_minutes: float | None = Field(15.0, gt=0)
    """Save every so many minutes."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept, the best one aside."""
    sync_batch_norm: bool = True
    """Batch norms use the statistics of the global batch."""
    activation_checkpointing: bool = False
    """Recompute activations of the towers in the backward pass."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of the math. Default: torch's own choice."""
    trackers: list[str] = ["tensorboard"]
    """Accelerate trackers beside metrics.jsonl."""
    log_samples: bool = False
    """Write the sample ids of every step's global batch to sample_ids.jsonl."""
    nonfinite_limit: int = Field(5, ge=1)
    """Updates in a row skipped for a non-finite loss or gradient before the run stops."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        given = [k for k in ("steps", "epochs", "samples", "minutes") if getattr(self, k) is not None]
        if len(given) != 1:
            found = f"found {' and '.join(given)}" if given else "found none"
            raise ValueError(
                f"train needs exactly one of steps, epochs, samples and minutes ({found}); set the others to null"
            )
        return self


TaskName = Literal[
    "zero_shot",
    "retrieval",
    "multilabel",
    "linear_probe",
    "few_shot",
    "knn",
    "geometry",
    "corruptions",
    "fine_tune",
    "associations",
]
"""What can be measured on a data set."""


def _separated(value: Any) -> Any:
    """One word, words with commas between them, or a list."""
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else value


Words = BeforeValidator(_separated)


class SuiteConfig(Section):
    """One data set judged while training and at the end."""

    data: str
    """Folder in CLIP_benchmark's WebDataset layout, or a pattern of paired shards."""
    task: Annotated[list[TaskName], Words, Field(min_length=1)] = ["zero_shot"]
    """What to measure: one task or several."""
    slice_by: Annotated[list[str], Words] = []
    """Metadata fields (entries of the JSON member) to break the accuracies of classifications down by."""


class EvaluateConfig(Section):
    """Evaluation in and after training."""

    suites: dict[str, SuiteConfig] = {}
    """Name -> data set and task."""
    every: int | None = Field(None, ge=1)
    """Evaluate every so many steps. Default: at the end only."""
    best: str | None = None
    """The metric that picks the best checkpoint, for example `unseen_style/zero_shot/acc1`. Default: the
    first suite's main one."""
    batch_size: int = Field(256, ge=1)
    """Pictures or captions a forward pass."""


class Config(Section):
    """Everything a run needs."""

    run_dir: Path
    """Folder the run writes; it must not exist unless resumed."""
    seed: int = Field(0, ge=0)
    """The same seed gives the same run."""
    data: DataConfig
    """Where samples come from."""
    model: ModelConfig
    """The dual encoder."""
    objectives: dict[str, ObjectiveConfig] = {"contrastive": ObjectiveConfig()}
    """Objective name -> weight, schedule and its own options."""
    mixer: MixerConfig = MixerConfig()
    """Balance between the objectives."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    train: TrainConfig
    """Length, precision, safety."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation."""

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.optim.warmup >= 1 and self.train.minutes is not None:
            raise ValueError("optim.warmup counts steps, but train.minutes measures the run; give a fraction below 1")
        if all(objective.weight == 0 for objective in self.objectives.values()):
            raise ValueError("objectives: none has a weight above 0; add one, for example contrastive: {weight: 1}")
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides (values are YAML), and check it all.

    Raises:
        UserError: the file is missing or no YAML mapping, or a key or value is wrong; the message names the key.
    """
    tree = read_tree(path)
    for override in overrides:
        set_key(tree, *parse_override(override))
    return parse_config(tree, where=str(path))


def read_tree(path: str | Path) -> dict[str, Any]:
    """A YAML file as a nested mapping, unchecked.

    Raises:
        UserError: the file is missing or no YAML mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"no configuration file at {path}; give the path of a YAML file, for example configs/quickstart.yaml"
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of keys to values, found {type(tree).__name__}")
    return tree


def parse_config(tree: Mapping[str, Any], where: str) -> Config:
    """Check a nested mapping; `where` names its origin in messages."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None


def dump_config(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the configuration, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        section = _section(field.annotation)
        if section is not None:
            yield from known_keys(section, f"{prefix}{name}.")


def parse_override(override: str) -> tuple[str, Any]:
    """Dotted key and value of `key=value`, the value read as YAML.

    Raises:
        UserError: it is of another form.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key=value, for example optim.lr=1e-3")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(
            f"override {override!r} has a value that is not valid YAML: {' '.join(str(error).split())}"
        ) from None


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put a value under a dotted key into a nested mapping; sections on the way are made.

    Raises:
        UserError: the key goes through a value that is no section.
    """
    node = tree
    *parents, last = key.split(".")
    for depth, name in enumerate(parents):
        child = node.setdefault(name, {})
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise UserError(f"{key}={value!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        node = child
    node[last] = value


def _section(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _explain(error: ValidationError) -> str:
    """The first problem, as one line with the dotted key and, for an unknown key, the nearest known one."""
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    more = f" ({error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        keys = list(known_keys())
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
        near = near or [k for k in keys if k.rsplit(".", 1)[-1] == location[-1]][:1]
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"unknown key '{key}'{hint}{more}"
    if problem["type"] == "missing":
        return f"missing key '{key}'; add it to the file or pass {key}=VALUE{more}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{message}{more}"
    return f"'{key}' = {problem['input']!r}: {message[0].lower()}{message[1:]}{more}"
