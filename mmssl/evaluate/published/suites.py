"""Suites of CLIP_benchmark and DataComp: their datasets in CLIP_benchmark's layout on the Hugging Face hub.

The names are those of `dataset_collection` in clip_benchmark/datasets/builder.py and of DataComp's tasklist.yml. On the
hub, CLIP_benchmark's are clip-benchmark/wds_NAME, DataComp's djghosh/wds_NAME_test, with dashes for slashes.
"""

from dataclasses import dataclass
from pathlib import Path

from mmssl.errors import UserError, one_line

_ROBUSTNESS = ("imagenetv2", "imagenet_sketch", "imagenet-a", "imagenet-r", "objectnet")
_VTAB = (
    "vtab/caltech101",
    "vtab/cifar100",
    "vtab/clevr_count_all",
    "vtab/clevr_closest_object_distance",
    "vtab/diabetic_retinopathy",
    "vtab/dmlab",
    "vtab/dsprites_label_orientation",
    "vtab/dsprites_label_x_position",
    "vtab/dtd",
    "vtab/eurosat",
    "vtab/kitti_closest_vehicle_distance",
    "vtab/flowers",
    "vtab/pets",
    "vtab/pcam",
    "vtab/resisc45",
    "vtab/smallnorb_label_azimuth",
    "vtab/smallnorb_label_elevation",
    "sun397",
    "vtab/svhn",
)
_FURTHER = (
    *("fer2013", "voc2007", "voc2007_multilabel", "cars", "fgvc_aircraft", "mnist", "stl10", "gtsrb", "country211"),
    *("renderedsst2", "vtab/cifar10"),
)
_DATACOMP = (
    *("vtab/caltech101", "cifar10", "vtab/cifar100", "vtab/clevr_count_all", "vtab/clevr_closest_object_distance"),
    *("country211", "vtab/dtd", "vtab/eurosat", "fgvc_aircraft", "food101", "gtsrb", "imagenet1k", "imagenet_sketch"),
    *("imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r", "vtab/kitti_closest_vehicle_distance", "mnist"),
    *("objectnet", "vtab/flowers", "vtab/pets", "voc2007", "vtab/pcam", "renderedsst2", "vtab/resisc45", "cars"),
    *("stl10", "sun397", "vtab/svhn", "wilds/camelyon17"),
)
_BY_CLASS = ("vtab/caltech101", "fgvc_aircraft", "vtab/flowers", "vtab/pets")
"""Datasets for which DataComp averages over the classes."""


@dataclass(frozen=True)
class Published:
    """One dataset of a suite."""

    name: str
    """Its name in the suite."""
    hub: str
    """USER/DATASET on the hub."""
    metric: str
    """Its metric in the suite: that of the task that fits the dataset."""


@dataclass(frozen=True)
class Suite:
    """Datasets whose main metrics are averaged."""

    text: str
    """Description in one line."""
    sets: tuple[Published, ...]


def _clip_benchmark(*names: str, metric: str = "acc1") -> tuple[Published, ...]:
    folders = [f"clip-benchmark/wds_{name.replace('/', '-')}" for name in names]
    metrics = ["mean_average_precision" if name.endswith("multilabel") else metric for name in names]
    return tuple(map(Published, names, folders, metrics))


def _datacomp(*names: str) -> tuple[Published, ...]:
    return tuple(
        Published(
            name,
            f"djghosh/wds_{name.replace('/', '-')}_test",
            "mean_per_class_recall" if name in _BY_CLASS else "acc1",
        )
        for name in names
    )


SUITES = {
    "vtab": Suite("VTAB's 19 datasets (Zhai et al. 2019), zero-shot", _clip_benchmark(*_VTAB)),
    "vtab+": Suite(
        "CLIP_benchmark's VTAB+, 36 datasets (Schuhmann et al. 2022), zero-shot",
        _clip_benchmark("imagenet1k", *_ROBUSTNESS, *_FURTHER, *_VTAB),
    ),
    "imagenet-robustness": Suite("five shifts of ImageNet, zero-shot", _clip_benchmark(*_ROBUSTNESS)),
    "retrieval": Suite(
        "COCO, Flickr8k and Flickr30k: captions find images",
        _clip_benchmark("mscoco_captions", "flickr8k", "flickr30k", metric="image_retrieval_recall@5"),
    ),
    "datacomp": Suite(
        "31 of DataComp's 38 (Gadre et al. 2023), zero-shot; without retrieval, iWildCam, FMoW, Dollar Street, GeoDE "
        "and WinoGAViL, which have other forms or metrics",
        _datacomp(*_DATACOMP),
    ),
}
"""Name -> suite."""


def find_suite(name: str) -> Suite:
    """The suite of a name.

    Raises:
        UserError: there is none.
    """
    if name not in SUITES:
        raise UserError(f"no suite is named {name!r}; there are: {', '.join(SUITES)} (mmssl suites)")
    return SUITES[name]


def download(dataset: Published) -> Path:
    """The test split, class names and templates of a dataset, in the hub's cache; what is there already is kept.

    Raises:
        UserError: the hub cannot be reached, or has no such dataset.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(dataset.hub, repo_type="dataset", allow_patterns=["*.txt", "test/*"]))
    except Exception as error:  # the client raises many kinds: no network, no such dataset, no permission
        raise UserError(
            f"cannot download {dataset.hub} from the Hugging Face hub: {one_line(error, 200)}; without a network, put "
            "the folder on this disk and give its path as DATA"
        ) from None
