"""Judges the samples of shipped weights, and adds what comes of it to their figures.

python tools/judge.py --data.root /path/to/data [--names '[gan.static_v1]']
python tools/tables.py
"""

from __future__ import annotations

import json
from pathlib import Path

from jsonargparse import ArgumentParser

from lightning_genmodels import BinarizedMNISTDataModule, list_weights, load
from lightning_genmodels.evaluation.classifier import SHIPPED, DigitClassifier
from lightning_genmodels.evaluation.quality import QualityReference, evaluate_quality
from lightning_genmodels.evaluation.report import METRICS, quality_table
from lightning_genmodels.system import reuse_freed_memory, write_atomically
from lightning_genmodels.weights.records import get_weights


def judge(
    data: BinarizedMNISTDataModule,
    names: list[str] | None = None,
    samples: int = 10_000,
    seeds: int = 3,
    extractor: Path | None = None,
) -> None:
    """Judges the weights of images of the data's shape and binarization.

    Args:
        data: The data module.
        names: Weights; default: all.
        samples: How many images each draws.
        seeds: How often.
        extractor: File of the digit classifier; default: the one that ships.
    """
    reference: QualityReference | None = None
    for name in names or list_weights():
        weights, model = get_weights(name), load(name)
        if weights.folder is None or (weights.binarization, model.event_shape) != (data.binarization, data.event_shape):
            print(f"{name}: left out, for it was trained on other data")
            continue
        if reference is None:
            classifier = DigitClassifier.load(extractor or SHIPPED)
            reference = QualityReference(data, "test", samples, seeds, classifier)
        quality = evaluate_quality(
            model, data, num_samples=samples, num_seeds=seeds, extractor=extractor, reference=reference
        )
        content = json.dumps({**weights.metrics, "quality": quality}, indent=2) + "\n"
        write_atomically(weights.folder / METRICS, content.encode())
        print(quality_table({name: quality}), flush=True)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_function_arguments(judge, skip={"data"})
    parser.add_class_arguments(BinarizedMNISTDataModule, "data")
    options = parser.instantiate(parser.parse_args())
    reuse_freed_memory()
    judge(**{key: value for key, value in vars(options).items() if key != "config"})
