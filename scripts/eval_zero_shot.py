"""Zero-shot classification, to copy and change: python scripts/eval_zero_shot.py runs/quickstart DATA..."""

import argparse
import sys
from pathlib import Path

import mmssl
from mmssl.errors import UserError
from mmssl.evaluate import console, open_dataset, suite


def main() -> None:
    """Load a model, evaluate it on each dataset, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a run folder, or its model/ folder")
    parser.add_argument("data", nargs="+", help="folders in CLIP_benchmark's layout, or patterns of labelled shards")
    parser.add_argument("--classnames", help="file with one class name a line, or `imagenet`")
    parser.add_argument("--templates", help="file with one template a line, {c} for the name, or `openai-imagenet`")
    parser.add_argument("--label", help="the JSON entry that holds the label, where there is no .cls")
    parser.add_argument("--out", type=Path, help="folder for results.json, tables and plots")
    args = parser.parse_args()

    model = mmssl.load(args.model)
    datasets = [
        open_dataset(data, classnames=args.classnames, templates=args.templates, label=args.label) for data in args.data
    ]
    options = suite.SuiteOptions(
        logit_scale=model.logit_scale,
        progress=lambda what, done: print(f"\r{what} {done:,}", end="\033[K", file=sys.stderr),
    )
    results = suite.run(model, {dataset.name: (dataset, "zero_shot") for dataset in datasets}, args.out, options)
    print("\r\033[K", end="", file=sys.stderr)
    print(console.format_results(results))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
