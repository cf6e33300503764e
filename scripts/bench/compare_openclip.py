"""Train mmssl and OpenCLIP 3.3's own trainer in turn, on the same shards, with towers of the same size, for
the same minutes on this machine, and compare their zero-shot accuracy and their retrieval.

    python -m scripts.bench.compare_openclip --minutes 15 --seeds 0 1 2 --train 'shards/train/*.tar' \\
        --test style=shards/emoji-unseen-style concepts=shards/emoji-unseen-concepts

OpenCLIP lives in an environment of its own (made on first use, or given by --peer-python). Its model is built
from our configuration: the same timm model and image size; a text tower of the same width, layers, heads
and context with OpenCLIP's own tokenizer. Before each of its runs its speed is measured, and the number of
steps is chosen so that its cosine schedule ends when the minutes end; start-up counts for neither. With several
--peer-lr, the first seed is run with each, and the one with the best mean of all metrics goes on. Finished runs are
kept in --out and skipped. Retrieval counts images with the same caption as right, for both sides.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmssl.config import Config, load_config
from mmssl.data import expand
from mmssl.errors import UserError
from mmssl.evaluate.tasks import retrieval
from scripts.bench.openclip_env import PEER_CACHE, make_environment

Metrics = dict[str, float]
RETRIEVAL = retrieval.Retrieval.main_metrics
MODEL = "peer"
PEER_SIDE = Path(__file__).with_name("openclip_trainer.py")
PASSES_PER_EPOCH = 8  # the sets are small; longer epochs spare OpenCLIP the pauses between them


@dataclass(frozen=True)
class Test:
    """A zero-shot test, as both sides read it."""

    name: str
    spec: str
    shards: list[str]
    classnames: str | None
    templates: str


@dataclass(frozen=True)
class Speed:
    """Speed of OpenCLIP's trainer."""

    precision: str
    workers: int
    step_seconds: float
    startup_seconds: float
    """Seconds that the first epoch takes beyond its steps."""


@dataclass(frozen=True)
class Peer:
    """OpenCLIP's environment and settings."""

    python: str
    models: Path
    work: Path
    shards: list[str]
    passes: int
    """Steps of one pass over the data."""
    batch: int
    wd: float
    extra: list[str]

    def train(self, name: str, speed: Speed, steps: int, epochs: int, seed: int, lr: float = 1e-3) -> list[float]:
        """Run OpenCLIP's trainer for `epochs` epochs of `steps` steps; returns the seconds of each epoch."""
        shutil.rmtree(self.work / name, ignore_errors=True)
        times = self.work / f"{name}.times.json"
        total = steps * epochs
        run(
            [
                *(self.python, str(PEER_SIDE), "train", str(self.models), str(times)),
                *("--model", MODEL, "--dataset-type", "webdataset", "--train-data", "::".join(self.shards)),
                *("--train-num-samples", str(steps * self.batch), "--batch-size", str(self.batch)),
                *("--epochs", str(epochs), "--lr", str(lr), "--wd", str(self.wd)),
                *("--warmup", str(max(1, total // 20)), "--precision", speed.precision, "--device", "cpu"),
                *("--workers", str(speed.workers), "--seed", str(seed), "--save-frequency", "0"),
                *("--logs", str(self.work), "--name", name, *self.extra),
            ],
            self.work / f"{name}.log",
        )
        return [float(s) for s in json.loads(times.read_text())]

    def evaluate(self, name: str, epochs: int, tests: Sequence[Test]) -> dict[str, Metrics]:
        """Metrics of the final checkpoint on each test."""
        table = {t.name: {"shards": t.shards, "classnames": t.classnames, "templates": t.templates} for t in tests}
        checkpoint = self.work / name / "checkpoints" / f"epoch_{epochs}.pt"
        arguments = [str(self.models), MODEL, str(checkpoint), json.dumps(table)]
        lines = run([self.python, str(PEER_SIDE), "eval", *arguments], self.work / f"{name}.eval.log")
        found: dict[str, Metrics] = {k: {"acc1": float(v)} for k, v in json.loads(lines.splitlines()[-1]).items()}
        for test, metrics in found.items():
            pairs = Path(f"{checkpoint}.{test}.pt")
            if pairs.is_file():
                metrics.update(retrieval_metrics(torch.load(pairs, weights_only=True)))
        return found


def retrieval_metrics(pairs: dict[str, Any]) -> Metrics:
    """Recall of image-caption pairs: `images` and `texts`, unit rows [N, D], and `captions`."""
    rows = torch.arange(len(pairs["captions"]))
    found = retrieval.search(pairs["images"], pairs["texts"], rows, retrieval.same_words(pairs["captions"]), rows)
    return {name: found.metrics[name] for name in RETRIEVAL}


def run(command: Sequence[str], log: Path) -> str:
    """Run a command with its output in `log`; returns its standard output."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
        errors.write(done.stdout)
    if done.returncode != 0:
        raise UserError(f"{command[1]} {command[2]} failed with exit code {done.returncode}; see {log}")
    return done.stdout


def peer_model(config: Config, context: int | None) -> dict[str, dict[str, object]]:
    """File name -> content: OpenCLIP's model config for towers of the same size, and its timm tower."""
    vision, text = config.model.vision, config.model.text.config
    kind, _, name = vision.name.partition(":")
    if kind != "timm" or vision.pretrained is not None or text is None:
        raise UserError("the comparison needs a timm vision tower and a text tower built from a config, untrained")
    size: dict[str, object] = {} if vision.image_size is None else {"image_size": vision.image_size}
    model = {
        "embed_dim": config.model.embed_dim,
        "vision_cfg": {"timm_model_name": "peer_tower", "timm_pool": "", "timm_proj": "linear", **size},
        "text_cfg": {
            "context_length": context or config.model.text.max_tokens,
            "vocab_size": 49408,
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        },
    }
    return {f"{MODEL}.json": model, "tower.json": {"name": name, "options": vision.options}}


def measure(peer: Peer, precision: str, workers: int, seconds: float) -> Speed:
    """Time OpenCLIP for about `seconds`: a first epoch with all start-up in it, then one of bare steps."""
    speed = Speed(precision, workers, 1.0, 0.0)
    steps = 2 * workers * math.ceil(4 / workers)
    first, second = peer.train("speed", speed, steps, 2, seed=0)
    speed = Speed(precision, workers, second / steps, max(0.0, first - second))
    steps = workers * int(seconds / speed.step_seconds / workers / 2)
    if steps <= 8:
        return speed
    first, second = peer.train("speed", speed, steps, 2, seed=0)
    return Speed(precision, workers, (first + second - speed.startup_seconds) / (2 * steps), speed.startup_seconds)


def fastest(peer: Peer, precisions: Sequence[str], workers: Sequence[int], seconds: float) -> Speed:
    """The fastest of the settings for OpenCLIP on this machine."""
    speeds = [measure(peer, p, w, seconds) for p in precisions for w in workers if w <= len(peer.shards)]
    for s in speeds:
        print(
            f"open_clip {s.precision}, {s.workers} workers: {peer.batch / s.step_seconds:.0f} samples/s",
            flush=True,
        )
    return min(speeds, key=lambda s: s.step_seconds)


def run_peer(peer: Peer, speed: Speed, seed: int, lr: float, minutes: float, tests: Sequence[Test]) -> dict[str, Any]:
    """One run of OpenCLIP."""
    speed = measure(peer, speed.precision, speed.workers, min(60.0, minutes * 15))
    steps = max(1, round((minutes * 60 - speed.startup_seconds) / speed.step_seconds))
    epochs = max(1, round(steps / (peer.passes * PASSES_PER_EPOCH)))
    steps = max(1, round(steps / epochs / speed.workers)) * speed.workers
    name = f"open_clip-{seed}-{lr:g}"
    spent = sum(peer.train(name, speed, steps, epochs, seed, lr))
    return {
        "metrics": peer.evaluate(name, epochs, tests),
        "lr": lr,
        "seconds": round(spent, 1),
        "steps": steps * epochs,
        "samples": steps * epochs * peer.batch,
        "precision": speed.precision,
        "workers": speed.workers,
    }


def run_ours(args: argparse.Namespace, peer: Peer, seed: int, tests: Sequence[Test]) -> dict[str, object]:
    """One run of mmssl, on batches of the peer's size."""
    work = peer.work
    folder = work / f"mmssl-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    changes = [
        f"run_dir={folder}",
        f"seed={seed}",
        f"data.train={json.dumps(args.train)}",
        "evaluate.suites={}",
    ]
    changes += [*length(args.minutes), *args.set]
    run([sys.executable, "-m", "mmssl", "train", args.config, *changes], work / f"mmssl-{seed}.log")
    metrics = {}
    for test in tests:
        out = work / f"mmssl-{seed}.{test.name}.json"
        tasks = "zero_shot,retrieval" if count_samples(test.shards) else "zero_shot"
        command = [sys.executable, "-m", "mmssl", "eval", str(folder), test.spec, "--task", tasks]
        run([*command, "--templates", test.templates, "--json", str(out)], out.with_suffix(".log"))
        found = {name: value for task in json.loads(out.read_text()).values() for name, value in task.items()}
        metrics[test.name] = {name: found[name] for name in ("acc1", *RETRIEVAL) if name in found}
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {"metrics": metrics, "steps": last["step"], "samples": last["step"] * peer.batch}


def length(minutes: float) -> list[str]:
    """Overrides that set the length of training."""
    others = [f"train.{name}=null" for name in ("steps", "epochs", "samples")]
    return [*others, f"train.minutes={minutes}"]


def count_samples(shards: Sequence[str]) -> int:
    """Captions in local shards."""
    total = 0
    for shard in shards:
        with tarfile.open(shard) as tar:
            total += sum(member.name.endswith(".txt") for member in tar)
    return total


def open_tests(specs: Sequence[str], work: Path) -> list[Test]:
    """`name=FOLDER` (CLIP_benchmark's layout) or `name=PATTERN` (class = `label` of the JSON member)."""
    plain = work / "templates.txt"
    plain.write_text("{c}\n")
    tests = []
    for spec in specs:
        name, _, place = spec.partition("=")
        folder = Path(place)
        if folder.is_dir():
            shards, names = expand(str(folder / "test" / "*.tar")), str(folder / "classnames.txt")
            tests.append(Test(name, place, shards, names, str(folder / "zeroshot_classification_templates.txt")))
        else:
            tests.append(Test(name, place, expand(place), None, str(plain)))
    return tests


def report(cells: dict[str, dict[str, Any]], seeds: Sequence[int], tests: Sequence[str]) -> None:
    """Print each metric of both sides per seed and test, and the ratio of the means."""
    print(f"\n{'test':<24}{'metric':<28}{'seed':>6}{'mmssl':>10}{'open_clip':>11}{'ratio':>8}")
    best = best_rate(cells)
    for test, metric in ((test, metric) for test in tests for metric in ("acc1", *RETRIEVAL)):
        pairs = []
        for seed in seeds:
            sides = (cells.get(f"mmssl-{seed}"), cells.get(f"open_clip-{seed}-{best:g}"))
            found = [side["metrics"].get(test, {}).get(metric) if side else None for side in sides]
            if None not in found:
                pairs.append(found)
                print(line(test, metric, str(seed), *found))
        if pairs:
            print(line(test, metric, "mean", *(sum(column) / len(pairs) for column in zip(*pairs, strict=True))))


def best_rate(cells: dict[str, dict[str, Any]]) -> float:
    """OpenCLIP's learning rate with the best mean of all metrics, among those run with its first seed."""
    peers = [cell for cell in cells.values() if "lr" in cell]
    means: dict[float, float] = {}
    for cell in peers:
        values = [value for metrics in cell["metrics"].values() for value in metrics.values()]
        means.setdefault(cell["lr"], sum(values) / len(values))
    return max(means, key=lambda lr: means[lr], default=0.0)


def line(test: str, metric: str, seed: str, ours: float, peer: float) -> str:
    """One row of the table."""
    return f"{test:<24}{metric:<28}{seed:>6}{ours:>10.4f}{peer:>11.4f}{ours / peer if peer else math.inf:>8.2f}"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml", help="our configuration")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to our configuration")
    parser.add_argument("--train", default="shards/train/*.tar", help="pattern of training shards")
    parser.add_argument("--test", nargs="+", required=True, metavar="NAME=FOLDER_OR_PATTERN")
    parser.add_argument("--minutes", type=float, default=15.0, help="wall-clock minutes of training, each side")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/compare_openclip"), help="results and logs")
    parser.add_argument("--peer-python", help="interpreter with open_clip_torch 3.3.0 and its trainer's needs")
    parser.add_argument("--peer-cache", type=Path, default=PEER_CACHE)
    parser.add_argument("--peer-precisions", nargs="+", default=["fp32", "amp_bf16"], help="the fastest is taken")
    parser.add_argument("--peer-workers", type=int, nargs="+", default=[1, 2], help="the fastest is taken")
    parser.add_argument(
        "--peer-lr", type=float, nargs="+", default=[1e-3], help="the best with the first seed is taken"
    )
    parser.add_argument("--peer-wd", type=float, default=0.2)
    parser.add_argument("--peer-context", type=int, help="its context; default: our model.text.max_tokens")
    parser.add_argument(
        "--peer-args", nargs=argparse.REMAINDER, default=[], help="further arguments of OpenCLIP's trainer"
    )
    return parser.parse_args()


def make_peer(args: argparse.Namespace, config: Config) -> Peer:
    """OpenCLIP with a model of our size, on our shards."""
    work: Path = args.out
    (work / "models").mkdir(parents=True, exist_ok=True)
    for name, content in peer_model(config, args.peer_context).items():
        (work / "models" / name).write_text(json.dumps(content, indent=1))
    shards, batch = expand(args.train), config.data.batch_size
    return Peer(
        python=args.peer_python or make_environment(args.peer_cache),
        models=work / "models",
        work=work,
        shards=shards,
        passes=math.ceil(count_samples(shards) / batch),
        batch=batch,
        wd=args.peer_wd,
        extra=args.peer_args,
    )


def kept_results(path: Path, args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Results of an earlier call, or an empty table: `settings`, and `cells` by `SIDE-SEED`.

    Raises:
        UserError: it was made with other settings.
    """
    left_out = ("out", "seeds", "peer_python", "peer_cache")
    settings: dict[str, Any] = {k: v for k, v in sorted(vars(args).items()) if k not in left_out}
    settings["our_config"] = config.model_dump(mode="json")
    settings["peer_model"] = peer_model(config, args.peer_context)[f"{MODEL}.json"]
    kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"settings": settings, "cells": {}}
    if kept["settings"] != json.loads(json.dumps(settings)):
        raise UserError(f"{path} holds results of other settings; give another --out or delete it")
    return kept


def main() -> None:
    """Measure the speed, do the missing runs, print the table."""
    args = parse()
    config = load_config(args.config, [f"data.train={json.dumps(args.train)}", *length(args.minutes), *args.set])
    peer = make_peer(args, config)
    tests = open_tests(args.test, peer.work)
    results = peer.work / "results.json"
    kept = kept_results(results, args, config)
    cells: dict[str, dict[str, Any]] = kept["cells"]
    speed: Speed | None = None

    def finish(name: str, run: Callable[[], dict[str, Any]]) -> None:
        if name in cells:
            return
        start = time.strftime("%H:%M")
        cells[name] = run()
        results.write_text(json.dumps(kept, indent=1))
        print(f"{start} {name}: {cells[name]}", flush=True)

    def peer_run(seed: int, lr: float) -> dict[str, Any]:
        nonlocal speed
        speed = speed or fastest(peer, args.peer_precisions, args.peer_workers, min(15.0, args.minutes * 15))
        return run_peer(peer, speed, seed, lr, args.minutes, tests)

    for number, seed in enumerate(args.seeds):
        finish(f"mmssl-{seed}", partial(run_ours, args, peer, seed, tests))
        for lr in args.peer_lr if number == 0 else [best_rate(cells)]:
            finish(f"open_clip-{seed}-{lr:g}", partial(peer_run, seed, lr))
    report(cells, args.seeds, [test.name for test in tests])
    for name, cell in cells.items():
        if "seconds" in cell and abs(cell["seconds"] / (args.minutes * 60) - 1) > 0.05:
            print(f"note: {name} trained for {cell['seconds']:.0f} s instead of {args.minutes * 60:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
