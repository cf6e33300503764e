"""An evaluation task of your own: does the model tell how many objects an image shows?

Run it from the folder of this file, or with that folder in PYTHONPATH:

    mmssl eval runs/mine shards/counts --task custom_task:Counting

or in a configuration: evaluate.suites.counts={data: shards/counts, task: custom_task:Counting}
Samples need a JSON member with a whole number `count`.
"""

import numpy as np
import torch

from mmssl.errors import UserError
from mmssl.evaluate import Metrics, Task, TaskContext, datasets
from mmssl.types import Sample


class Counting(Task):
    """Zero-shot prediction of the number of objects, by one prompt per number."""

    name = "counting"
    label = "counting objects"
    description = "The number of objects in an image, by prompts such as: a photo of 3 objects."
    main_metrics = ("acc1",)

    def check(self, dataset: datasets.Dataset, sample: Sample) -> None:
        """Refuse a sample without a count, before any image is encoded."""
        if not isinstance(sample.fields.get("count"), int):
            raise UserError(f"{sample.key} in {sample.shard} has no number 'count' in its JSON member")

    def run(self, context: TaskContext) -> Metrics:
        """Compare each image with a prompt per number that occurs."""
        counts = torch.tensor([sample.fields["count"] for sample in context.images.samples])
        numbers = counts.unique()
        prompts = context.encode_texts([f"a photo of {number} objects." for number in numbers.tolist()])
        predicted = numbers[(context.images.features @ prompts.T).argmax(dim=1)]
        error = (predicted - counts).abs().double().numpy()
        return {
            "acc1": float((error == 0).mean()),
            "mean_absolute_error": float(np.mean(error)),
            "samples": len(counts),
        }
