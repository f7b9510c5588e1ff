"""Computes what `check` compares answers with, from nbs/solutions.ipynb, and writes vlmamba_lite/exercises.json:  python tests/exercises.py

A case is a list of inputs, the result, and where the solution says so the gradients of `_gradients`. Tensors are {dtype, shape, values}, a tuple of
results is {results}.
"""
import copy
import json

import torch
from house import LIBRARY, page_code

from vlmamba_lite import exercises

PATH = LIBRARY / "exercises.json"


def encode(value):
    "Numbers, texts and lists as JSON has them, tensors with their dtype; ten digits, so that every machine writes the same."
    if isinstance(value, torch.Tensor):
        return {"dtype": str(value.dtype).split(".")[1], "shape": list(value.shape), "values": encode(value.detach().flatten().tolist())}
    if isinstance(value, (list, tuple)):
        return [encode(i) for i in value]
    return float(f"{value:.10g}") if isinstance(value, float) else value


def solved():
    "The names that nbs/solutions.ipynb defines, its code run once; what it says of its own answers is not asked."
    names, asked = {}, exercises.review
    try:
        exercises.review = lambda name, answer: exercises.RIGHT
        exec(compile(page_code("solutions"), "solutions", "exec"), names)
    finally:
        exercises.review = asked
    return names


def expected(names):
    "{name of an exercise: its cases, or its value} from the tables SOLUTIONS and VALUES."
    found = {name: {"result": encode(value)} for name, value in names["VALUES"].items()}
    for name, (function, cases, gradients) in names["SOLUTIONS"].items():
        found[name] = {"cases": []}
        for case in cases:
            inputs = copy.deepcopy(list(case))
            for x in inputs if gradients else ():
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    x.requires_grad_()
            result = function(*inputs)
            entry = {"inputs": encode(case), "result": {"results": encode(result)} if isinstance(result, tuple) else encode(result)}
            found[name]["cases"].append(entry | ({"gradients": encode(exercises._gradients(result, inputs))} if gradients else {}))
    return dict(sorted(found.items()))


def main():
    lines = (f"{json.dumps(name)}: {json.dumps(task, separators=(',', ':'))}" for name, task in expected(solved()).items())
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
