"""The answers of the routes, independent of HTTP. Each method of `Service` runs on a thread of a worker."""

import base64
import io
import itertools
from collections.abc import Sequence
from pathlib import PurePath
from typing import BinaryIO, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from mmssl.apps.explain import image_maps, methods_of, overlay, word_scores
from mmssl.apps.search import Embeddings, Index, ShardImages
from mmssl.apps.serve.limits import ServerLimits
from mmssl.apps.serve.schemas import Caps, Guess, Guesses, Hits, Map, ModelFacts, SearchHit, WordScore
from mmssl.data.transforms import DecodeError, decoding
from mmssl.errors import UserError
from mmssl.evaluate import encode
from mmssl.inference import Model, probabilities

THUMBNAIL = 320
"""Longer side of a thumbnail in pixels."""
Method = Literal["rise", "occlusion"]
"""Maps that need no gradients. Methods with gradients hook into layers that other requests use at the same time."""


class RefusalError(Exception):
    """A request that cannot be served: the HTTP status and the reason."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class Service:
    """A model and an index that answer requests."""

    def __init__(self, model: Model, index: Index | None, limits: ServerLimits) -> None:
        self.model = model
        self.index = index
        self.limits = limits
        self.images = None if index is None else ShardImages(index)

    def facts(self) -> ModelFacts:
        """Model, index and limits."""
        limits = self.limits
        return ModelFacts(
            vision=self.model.config.vision.name,
            dimensions=self.model.config.embed_dim,
            image_size=self.model.vision.image_size,
            images=None if self.index is None else len(self.index),
            fields=[] if self.index is None else self.index.fields,
            methods=self.methods(),
            calibrated=self.model.calibration is not None,
            limits=Caps(
                upload_bytes=limits.upload_bytes,
                pixels=limits.pixels,
                text_chars=limits.text_chars,
                labels=limits.labels,
                hits=limits.hits,
                conditions=limits.conditions,
            ),
        )

    def methods(self) -> list[str]:
        """Map methods that this vision tower supports."""
        possible = methods_of(self.model.vision)
        return [name for name in get_args(Method) if name in possible]

    def by_text(self, text: str, k: int, where: Sequence[str] = ()) -> Hits:
        """Find the images nearest to a text."""
        self._require_index()
        return self._nearest(self.model.encode_text(text).numpy(), k, where, self.model.calibration)

    def by_image(self, upload: BinaryIO, k: int, where: Sequence[str] = ()) -> Hits:
        """Find the images nearest to an image."""
        self._require_index()
        return self._nearest(self.model.encode_rendered(self._render(upload)[None]).numpy(), k, where)

    def by_row(self, row: int, k: int, where: Sequence[str] = ()) -> Hits:
        """Find the images nearest to an image of the index, without the image itself."""
        index = self._require_index()
        self._check(row)
        hits = self._nearest(index.embedding(row)[None], k + 1, where).hits
        return Hits(hits=[hit for hit in hits if hit.row != row][:k])

    def labels(self, upload: BinaryIO, labels: Sequence[str], template: str) -> Guesses:
        """Classify an image with the given labels."""
        image = self.model.encode_rendered(self._render(upload)[None])
        names = list(dict.fromkeys(labels))
        similarities = image @ encode.class_weights(self.model, names, (template,)).T
        (found,) = probabilities.decide(names, similarities, self.model.logit_scale, self.model.calibration)
        verdict, by_label = found.verdict, dict(zip(names, similarities[0].tolist(), strict=True))
        guesses = [
            Guess(
                label=label,
                probability=probability,
                similarity=by_label[label],
                match=None if verdict is None else verdict.matches[label],
                likely=None if verdict is None else label in verdict.likely,
            )
            for label, probability in found.items()
        ]
        known = (None, None) if verdict is None else (verdict.none, verdict.coverage)
        return Guesses(labels=guesses, none=known[0], coverage=known[1])

    def map(self, upload: BinaryIO, text: str, method: Method) -> Map:
        """Map a text to places in an image."""
        if method not in self.methods():
            raise RefusalError(422, f"method: this model's vision tower supports {', '.join(self.methods())}")
        rendered = self._render(upload)
        image, words = self.model.encode_rendered(rendered[None])[0], self.model.encode_text(text)
        device = self.model.device
        found = image_maps(self.model.encoder, rendered[None].to(device), words.to(device), method).cpu()
        return Map(
            similarity=float(image @ words[0]),
            method=method,
            grid=found[0].tolist(),
            overlay=_data_uri(overlay(rendered, found[0])),
            words=[WordScore(word=word, fall=fall) for word, fall in word_scores(self.model, text, image)],
        )

    def thumbnail(self, row: int) -> bytes:
        """A thumbnail of an image of the index, as JPEG."""
        self._require_index()
        self._check(row)
        assert self.images is not None
        content = self.images.read(row)
        if content is None:
            raise RefusalError(404, f"image {row} cannot be read; its shard is not on this machine, or has changed")
        try:
            header = decoding.read_header(content, self.limits.pixels)
            shrink = max(header.width, header.height) / THUMBNAIL
            reduce = next((factor for factor in decoding.REDUCTIONS if shrink >= factor and header.reducible), 1)
            image = Image.fromarray(decoding.decode(content, header, reduce))
        except DecodeError as error:
            what = "too large to be shown" if error.costly else "broken"
            raise RefusalError(404, f"image {row} is {what}") from None
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return _encoded(image, "JPEG")

    def _require_index(self) -> Index:
        if self.index is None:
            raise RefusalError(404, "no index to search; start the server with one: mmssl serve MODEL INDEX")
        return self.index

    def _check(self, row: int) -> None:
        count = len(self._require_index())
        if not 0 <= row < count:
            raise RefusalError(404, f"no image {row}; the index has {count}")

    def _shorten(self, text: str) -> str:
        limit = self.limits.caption_chars
        return text if len(text) <= limit else f"{text[: limit - 1]}…"

    def _some(self, fields: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
        """The first of the fields, as many as are allowed to be long together."""
        lengths = itertools.accumulate(len(name) + len("".join(value)) for name, value in fields.items())
        return {
            n: v for (n, v), length in zip(fields.items(), lengths, strict=True) if length <= self.limits.field_chars
        }

    def _nearest(
        self,
        embeddings: Embeddings,
        k: int,
        where: Sequence[str],
        calibration: probabilities.Calibration | None = None,
    ) -> Hits:
        """Args:
        calibration: of a query by text, to say which hits match.
        """
        index = self._require_index()
        try:
            index.conditions(where)
        except UserError as error:
            raise RefusalError(422, str(error).removeprefix("--")) from None
        rows, similarities = index.nearest(embeddings, min(k, len(index)), where=where)
        numbers, cosines = rows[0].tolist(), similarities[0].tolist()
        matches = (
            [None] * len(numbers)
            if calibration is None
            else calibration.match_probability(torch.tensor(cosines)).tolist()
        )
        return Hits(
            hits=[
                SearchHit(
                    row=row,
                    similarity=hit.similarity,
                    match=match,
                    key=self._shorten(hit.key),
                    caption=self._shorten(hit.caption),
                    shard=self._shorten(PurePath(hit.shard).name),
                    fields=self._some(hit.fields),
                )
                for row, match, hit in zip(numbers, matches, index.hits(numbers, cosines), strict=True)
            ]
        )

    def _render(self, upload: BinaryIO) -> Tensor:
        """Render an uploaded image for the model, uint8 [3, S, S]. Its size is checked before it is decoded."""
        content = upload.read()
        try:
            header = decoding.read_header(content, self.limits.pixels)
        except DecodeError as error:
            raise RefusalError(413 if error.costly else 415, str(error).removesuffix(" (data.max_pixels)")) from None
        if max(header.width, header.height) > self.limits.elongation * min(header.width, header.height):
            raise RefusalError(
                422, f"the image is more than {self.limits.elongation} times as long as it is wide; crop it first"
            )
        try:
            return self.model.render(content)
        except DecodeError as error:
            raise RefusalError(422, str(error)) from None


def _data_uri(image: Tensor) -> str:
    png = _encoded(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), "PNG")
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()
