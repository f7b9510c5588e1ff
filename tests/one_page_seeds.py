"""Trains the model of chapter 00 with three seeds, one after the other, and writes data/results/one_page.json.

    python tests/one_page_seeds.py
"""
import time
from pathlib import Path

import torch

from vlmamba_lite.one_page import VLMamba, load_easy_vqa, train
from vlmamba_lite.training.results import write_result

ROOT = Path(__file__).resolve().parent.parent
STEPS = 340                                              # as in the notebook


def main():
    images, ids, labels, vocabulary = load_easy_vqa(ROOT / "data" / "easy_vqa")
    train_set, validation = ([part[rows] for part in (images, ids, labels)] for rows in (slice(3600), slice(3600, 4000)))
    runs = []
    for seed in (0, 1, 2):
        torch.manual_seed(seed)
        model, cpu, wall = VLMamba(vocabulary), time.process_time(), time.time()
        *_, (step, loss, what, yes_no, right) = train(model, *train_set, validation, steps=STEPS)
        runs.append(dict(seed=seed, steps=step, loss=loss, what=what, yes_or_no=yes_no, validation_accuracy=right,
                         cpu_seconds=time.process_time() - cpu, wall_seconds=time.time() - wall))
    write_result(ROOT / "data" / "results" / "one_page.json", seed=[0, 1, 2], runs=runs)


if __name__ == "__main__":
    main()
