"""A trained dual encoder with its tokenizer and preprocessing, and how to load one from anywhere."""

import hashlib
import json
import logging
import shlex
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmssl.config import ModelConfig
from mmssl.data.transforms import DecodeError, EvalView, Tokenizer, load_tokenizer
from mmssl.errors import UserError
from mmssl.inference.images import ImageInput, as_image_list, image_content
from mmssl.inference.probabilities import Calibration, LabelProbabilities, read_calibration, write_calibration
from mmssl.inference.zero_shot import zero_shot
from mmssl.models import (
    DualEncoder,
    ImageEncoder,
    OpenClipText,
    TextTower,
    VisionTower,
    build_dual_encoder,
)
from mmssl.models.pretrained import PretrainedModel, foreign, is_transformers_folder, read_open_clip, read_transformers
from mmssl.precision import Precision, autocast

_log = logging.getLogger(__name__)

FORMAT = 1
_LOCATIONS = ("checkpoint_path", "cache_dir", "hf_model_name", "state_dict")
"""Options of timm, open_clip and transformers that name files elsewhere, as all with `pretrained` in their name."""


class Model:
    """Encodes images and texts as unit vectors in one space, and classifies images zero-shot."""

    def __init__(
        self,
        encoder: DualEncoder,
        tokenizer: Tokenizer,
        config: ModelConfig,
        notes: Sequence[str] = (),
        precision: Precision = "fp32",
    ) -> None:
        """Args:
        notes: the origin of the weights and what was left out, one line each.
        precision: number format that the towers compute in; the weights keep theirs.
        """
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.config = config
        self.notes = list(notes)
        self.precision: Precision = precision
        self.calibration: Calibration | None = None
        """Probabilities fitted on held-out pairs by `mmssl calibrate`; None without."""
        self.folder: Path | None = None
        """The model folder of mmssl that it was loaded from; None if it comes from elsewhere."""
        self.view = EvalView(encoder.vision.image_size, config.vision.fit, interpolation=config.vision.interpolation)

    @property
    def vision(self) -> VisionTower:
        """The vision tower, an nn.Module."""
        return self.encoder.vision

    @property
    def text(self) -> TextTower:
        """The text tower, an nn.Module."""
        return self.encoder.text

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.encoder.log_logit_scale.device

    @property
    def logit_scale(self) -> float:
        """Factor from cosine similarities to logits."""
        return float(self.encoder.logit_scale.detach())

    @property
    def label_scale(self) -> float:
        """Factor from cosine similarities, bent by `label_curve`, to the logits of labels, fitted or trained."""
        return self.logit_scale if self.calibration is None else self.calibration.label_scale

    @property
    def label_curve(self) -> float:
        """Steepness of the calibrated logits of labels at high similarities; 0 without a calibration."""
        return 0.0 if self.calibration is None else self.calibration.label_curve

    def to(self, device: torch.device | str) -> "Model":
        """Move the weights; returns itself."""
        self.encoder.to(device)
        return self

    def encode_image(
        self, images: ImageInput | Iterable[ImageInput], batch_size: int = 256, patches: bool = False
    ) -> Tensor:
        """Unit vectors [N, D], float32 on the CPU, of one image or several.

        Args:
            patches: one vector for each patch, or place of the last feature map: [N, rows, columns, D].

        Raises:
            UserError: a file cannot be read or decoded, an argument is none of an image, or the tower shows no patches.
            DecodeError: an image that is not a file cannot be decoded.
        """
        _check_batch_size(batch_size)
        inputs = as_image_list(images)
        rows = []
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(inputs), batch_size):
                batch = torch.stack(list(pool.map(self.render, inputs[start : start + batch_size])))
                rows.append(self.encode_rendered(batch, patches))
        places = (self.vision.places or 0,) * 2 if patches else ()
        return torch.cat(rows) if rows else torch.empty(0, *places, self.config.embed_dim)

    def render(self, image: ImageInput) -> Tensor:
        """An image as the model sees it: uint8 [3, S, S].

        Raises:
            UserError: the file cannot be read or decoded.
            DecodeError: an image that is not a file cannot be decoded.
        """
        if not isinstance(image, (str, Path)):
            return self.view(image_content(image))
        try:
            return self.view(Path(image).read_bytes())
        except OSError as error:
            raise UserError(f"cannot read image {image}: {error.strerror}") from None
        except DecodeError as error:
            raise UserError(f"{image} is not a usable image: {error}") from None

    def encode_rendered(self, images: Tensor, patches: bool = False) -> Tensor:
        """Unit vectors [N, D] of rendered images [N, 3, S, S]; of patches [N, rows, columns, D]. Float32 on the CPU."""
        encode = self.encoder.encode_patches if patches else self.encoder.encode_image
        return self._evaluate(lambda: encode(images.to(self.device)))

    def encode_text(self, texts: str | Iterable[str], batch_size: int = 256) -> Tensor:
        """Unit vectors [N, D], float32 on the CPU, of one text or several."""
        _check_batch_size(batch_size)
        captions = [texts] if isinstance(texts, str) else list(texts)
        wrong = next((text for text in captions if not isinstance(text, str)), None)
        if wrong is not None:
            raise UserError(f"expected texts, found a {type(wrong).__name__} among them: {str(wrong)[:40]}")
        rows, cut, unknown = [], 0, 0
        for start in range(0, len(captions), batch_size):
            tokens, mask, found = self.tokenizer.encode_and_measure(captions[start : start + batch_size])
            cut += sum(length > self.tokenizer.max_tokens for length in found.lengths)
            unknown += sum(count > 0 for count in found.unknown)
            rows.append(
                self._evaluate(lambda t=tokens, m=mask: self.encoder.encode_text(t.to(self.device), m.to(self.device)))
            )
        self._report_loss(len(captions), cut, unknown)
        return torch.cat(rows) if rows else torch.empty(0, self.config.embed_dim)

    def first_dimensions(self, dim: int) -> "Model":
        """The model whose embeddings are the first `dim` dimensions, normalised again. It shares the towers.

        Useful after training with `dims` (Matryoshka); a prefix of other embeddings finds less.

        Raises:
            UserError: there are fewer dimensions, or a tower of another library projects by itself.
        """
        full = self.config.embed_dim
        if dim == full:
            return self
        if not 1 <= dim < full:
            raise UserError(f"--dim {dim}: the embeddings of this model have {full} dimensions; give 1 to {full}")
        config = self.config.model_copy(update={"embed_dim": dim})
        notes = [*self.notes, f"the first {dim} of {full} dimensions"]
        return Model(self.encoder.first_dimensions(dim), self.tokenizer, config, notes, self.precision)

    def match(
        self, images: ImageInput | Iterable[ImageInput], texts: str | Iterable[str], batch_size: int = 256
    ) -> Tensor:
        """Probability that each image matches each text, float64 [N, M], if a match is as likely as not beforehand.

        Raises:
            UserError: the model is not calibrated, or an image cannot be used.
        """
        if self.calibration is None:
            raise UserError(
                "this model is not calibrated; fit probabilities on held-out pairs: mmssl calibrate RUN DATA"
            )
        return self.calibration.match_probability(
            self.encode_image(images, batch_size) @ self.encode_text(texts, batch_size).T
        )

    def classify(self, image: ImageInput, labels: str | Iterable[str], template: str = "{c}") -> LabelProbabilities:
        """Probability of each label for one image, highest first; of a calibrated model also `verdict`.

        Raises:
            UserError: labels are missing, empty or repeated, the template lacks `{c}`, or there are several images.
        """
        images = as_image_list(image)
        if len(images) != 1:
            raise UserError(f"classify takes one image, found {len(images)}; predict takes several")
        return zero_shot(self, labels, (template,))(images)[0]

    def image_module(self) -> ImageEncoder:
        """A copy of the image encoder (rendered images to unit vectors), to be trained further."""
        # fp16 would need a scaler of gradients.
        return ImageEncoder(self.encoder, "fp32" if self.precision == "fp16" else self.precision)

    def fingerprint(self) -> str:
        """A digest of everything that determines image features: weights, rendering, precision, kind of device."""
        words = self.image_fingerprint(), self.config.vision, self.config.projection, self.device.type, self.precision
        return hashlib.blake2b(repr(words).encode(), digest_size=16).hexdigest()

    def image_fingerprint(self) -> str:
        """A digest of the image tower's weights and of the rendering: the same on every device, and after `save`."""
        return _fingerprint(self.vision, self.encoder.image_projection, (vars(self.view), self.vision.statistics))

    def text_fingerprint(self) -> str:
        """A digest of the text tower's weights and of the vocabulary: the same on every device, and after `save`."""
        words = sorted(self.tokenizer.vocabulary.items()), self.tokenizer.max_tokens, self.text.pooling
        return _fingerprint(self.text, self.encoder.text_projection, words)

    def save(self, folder: str | Path) -> None:
        """Write model.safetensors, config.json and tokenizer/; `load` needs nothing else, and no network.

        A calibrated model also writes calibration.json.

        Raises:
            UserError: the folder cannot be written.
        """
        folder = Path(folder)
        state = self.encoder.saved_state()
        record = {"format": FORMAT, "model": self.self_contained().model_dump(mode="json", exclude={"start"})}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / "model.safetensors")
            self.tokenizer.save(folder / "tokenizer")
            (folder / "config.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
            write_calibration(folder, self.calibration)
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder} cannot be written: {reason}; free some space, or pick another folder") from None

    def self_contained(self) -> ModelConfig:
        """The configuration without names of other models or files; its tokenizer is `tokenizer/`."""
        vision = self.vision.to_config(self.config.vision)
        text = self.text.to_config("tokenizer", self.config.text.max_tokens)
        return self.config.model_copy(update={"text": text, "vision": vision, "start": None})

    def _report_loss(self, count: int, cut: int, unknown: int) -> None:
        """Warn, once per tokenizer, that captions lost words."""
        if self.tokenizer.loss_reported or not (cut or unknown):
            return
        self.tokenizer.loss_reported = True
        parts = []
        if cut:
            parts.append(f"{cut:,} ({cut / count:.1%}) are cut at {self.tokenizer.max_tokens} tokens: shorten them")
        if unknown:
            parts.append(f"{unknown:,} ({unknown / count:.1%}) hold letters or words that the tokenizer does not know")
        _log.warning("of %s captions, %s", f"{count:,}", "; ".join(parts))

    @torch.no_grad()
    def _evaluate(self, encode: Any) -> Tensor:
        training = self.encoder.training
        self.encoder.eval()
        try:
            with autocast(self.device.type, self.precision):
                features: Tensor = encode()
            return features.float().cpu()
        finally:
            self.encoder.train(training)


def _fingerprint(tower: nn.Module, projection: nn.Module, facts: object) -> str:
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=16)
    for name, tensor in sorted({**tower.state_dict(), **projection.state_dict(prefix="projection.")}.items()):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: give a number of 1 or more")


def load(source: str | Path) -> Model:
    """Load a model of this or of another library. Its `notes` say what was loaded.

    Args:
        source: a run folder or its `model/` folder; `open_clip:MODEL/TAG`, `open_clip:MODEL/FILE` or
            `open_clip:hf-hub:USER/MODEL`; `local-dir:FOLDER` of open_clip; a folder of Hugging Face's CLIPModel,
            SiglipModel or VisionTextDualEncoderModel, or `transformers:NAME` of the hub.

    Raises:
        UserError: the model is missing, or its files do not fit together.
    """
    words = str(source)
    library, _, name = words.partition(":")
    if library == "open_clip" and name:
        return _converted(read_open_clip(name))
    if library == "local-dir" and name:
        with foreign.reading(Path(name)):
            return _converted(read_open_clip(words), Path(name))
    if library == "transformers" and name:
        return _converted(read_transformers(name))
    folder = Path(source)
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if (folder / "open_clip_config.json").is_file():
        with foreign.reading(folder):
            return _converted(read_open_clip(f"local-dir:{folder}"), folder)
    if (folder / "config.yaml").is_file():
        raise UserError(
            f"run {source} has no model yet; it is written at the end: mmssl train --resume {shlex.quote(str(source))}"
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"no model at {source}; give a run folder with model/, a model folder (config.json, model.safetensors), "
            f"open_clip:MODEL/TAG or transformers:NAME"
        )
    with foreign.reading(folder):
        return _converted(read_transformers(str(folder)), folder) if is_transformers_folder(folder) else _own(folder)


def _converted(found: PretrainedModel, folder: Path | None = None) -> Model:
    """`folder`: the one that it was read from, which may have a calibration."""
    tokenizer = load_tokenizer(found.tokenizer, found.config.text.max_tokens)
    if found.drop_punctuation:
        tokenizer.drop_punctuation()
    if isinstance(found.encoder.text.encoder, OpenClipText) and found.tokenizer != "clip":
        found.encoder.text.encoder.pad_with(tokenizer.pad_id)
    model = Model(found.encoder.eval(), tokenizer, found.config, found.notes)
    model.calibration = None if folder is None else read_calibration(folder)
    return model


def _own(folder: Path) -> Model:
    try:
        record = foreign.read_json(folder / "config.json")
        if record["format"] != FORMAT:
            raise UserError(f"{folder} has format {record['format']!r}, this version reads {FORMAT}")
        config = ModelConfig.model_validate(record["model"])
        _check_self_contained(config, folder)
        tokenizer = load_tokenizer(str(folder / "tokenizer"), config.text.max_tokens)
        state = load_file(folder / "model.safetensors")
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise UserError(f"{folder} is not a model of mmssl: {' '.join(str(error).split())[:300]}") from error
    encoder = build_dual_encoder(config, tokenizer.vocab_size, tokenizer.pad_id)
    own = encoder.state_dict()
    differ = [k for k in own.keys() | state.keys() if k not in own or k not in state or own[k].shape != state[k].shape]
    if differ:
        raise UserError(
            f"{folder}: weights and config.json do not fit together ({len(differ)} differences, first "
            f"{sorted(differ)[0]})"
        )
    encoder.load_state_dict(state)
    text = config.text.model_copy(update={"tokenizer": str(folder / "tokenizer")})
    config = config.model_copy(update={"text": text})
    model = Model(encoder.eval(), tokenizer, config, [f"all {len(own)} weights match"])
    model.calibration, model.folder = read_calibration(folder), folder
    return model


def _check_self_contained(config: ModelConfig, folder: Path) -> None:
    """Raises UserError if the configuration of a model folder names other files, or weights to fetch."""
    outside = [
        *(["model.start"] if config.start is not None else []),
        *(["model.text.name"] if config.text.name is not None else []),
        *(["model.vision.pretrained"] if config.vision.pretrained is not None else []),
        *(f"model.vision.options.{key}" for key in config.vision.options if "pretrained" in key or key in _LOCATIONS),
        *(f"model.text.config.{key}" for key in config.text.config or {} if "pretrained" in key or key in _LOCATIONS),
    ]
    if outside:
        raise UserError(f"{folder / 'config.json'} sets {', '.join(outside)}: a model folder may not name other files")
