"""OpenCLIP's side of `python -m scripts.bench data`; runs in OpenCLIP's own environment and knows nothing of mmssl.

    python openclip_loader.py '{"shards": [...], "image_size": 224, "batch_size": 256, "workers": 1, "warm_up": 2,
                                "batches": 6}'

Its trainer's own loader, as its main() makes it. Prints `ready` after the batches of the warm-up and `done` after the
measured ones; waits for a line of input each time, so that the CPU time in between can be read from outside.
"""

import json
import sys
from types import SimpleNamespace

from open_clip import get_tokenizer
from open_clip.transform import image_transform
from open_clip_train.data import get_wds_dataset

ENDLESS = 10**9


def main() -> None:
    """Read batches."""
    settings = json.loads(sys.argv[1])
    arguments = SimpleNamespace(
        train_data="::".join(settings["shards"]),
        train_num_samples=ENDLESS,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=settings["batch_size"],
        workers=settings["workers"],
        world_size=1,
        seed=0,
    )
    transform = image_transform(settings["image_size"], is_train=True)
    batches = iter(get_wds_dataset(arguments, transform, True, tokenizer=get_tokenizer("ViT-B-32")).dataloader)
    for word, count in (("ready", settings["warm_up"]), ("done", settings["batches"])):
        for _ in range(count):
            images, _ = next(batches)
            assert images.shape == (settings["batch_size"], 3, settings["image_size"], settings["image_size"])
        print(word, flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    main()
