"""CPU seconds of a training step of the preset lite with Mamba-2 and with Mamba-3, one thread, in turns, in data/results/mixer_cost.json.

    python tests/mixer_cost.py [--repeats 15]
"""
import argparse
import time
from pathlib import Path
from statistics import median

import torch

from vlmamba_lite.cli.runs import prepare
from vlmamba_lite.data.easy_vqa import VQABatches
from vlmamba_lite.training.results import write_result

ROOT = Path(__file__).resolve().parent.parent
SIZES = dict(d_state=32, headdim=32, chunk_size=32)
MIXERS = {"mamba2": {}, "mamba3": SIZES, "mamba3, R = 2": SIZES | dict(is_mimo=True, mimo_rank=2, chunk_size=16)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=ROOT / "data" / "results" / "mixer_cost.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    models, spent = {}, {name: [] for name in MIXERS}
    for name, args in MIXERS.items():
        change = {"language": dict(mixer="mamba3", mixer_args=args)} if args else {}
        models[name], data = prepare("lite", 0, **change)
    batch = VQABatches(data["train"])[999]
    for _ in range(given.repeats + 1):                                   # in turns, so that a busy machine is busy for all
        for name, model in models.items():
            began = time.process_time()
            model(batch).loss.backward()
            model.zero_grad()
            spent[name].append(time.process_time() - began)
    rows = [dict(mixer=name, parameters=sum(p.numel() for p in model.parameters()), cpu_seconds=median(spent[name][1:]),       # the first warms up
                 times_mamba2=median(b / a for a, b in zip(spent["mamba2"][1:], spent[name][1:]))) for name, model in models.items()]
    print(*rows, sep="\n")
    write_result(given.output, seed=0, repeats=given.repeats, rows=rows)


if __name__ == "__main__":
    main()
