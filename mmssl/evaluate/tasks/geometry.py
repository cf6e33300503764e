"""The shape of the embedding space: closeness of pairs, use of the sphere, distance of the two modalities."""

from mmssl.errors import UserError
from mmssl.evaluate.datasets import Dataset
from mmssl.evaluate.labels import image_captions
from mmssl.evaluate.metrics import embedding
from mmssl.evaluate.task import Metrics, Task, TaskContext
from mmssl.types import Sample


class Geometry(Task):
    """Alignment, uniformity, modality gap and effective rank."""

    name = "geometry"
    label = "geometry of the space"
    description = "Alignment, uniformity, modality gap and effective rank of images and captions."

    def check(self, dataset: Dataset, sample: Sample) -> None:
        """A caption."""
        image_captions(sample)

    def run(self, context: TaskContext) -> Metrics:
        """Measure images and the first caption of each.

        Raises:
            UserError: the dataset has one sample only.
        """
        texts = [image_captions(sample)[0] for sample in context.images.samples]
        if len(texts) < 2:
            raise UserError(f"task 'geometry' of dataset {context.name!r} needs two samples or more; it has one")
        images = context.images.features
        return embedding.geometry(images, context.encode_texts(texts)) | {"samples": len(texts)}
