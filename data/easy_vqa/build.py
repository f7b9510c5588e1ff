"""Builds train.parquet and test.parquet from the MIT-licensed `easy-vqa` 1.0 package.

    pip install "easy-vqa==1.0" && python data/easy_vqa/build.py

One row an image: `image_id`, `image` (the package's own PNG bytes), `questions` and `answers` (lists of equal length).
"""
from importlib.metadata import version
from pathlib import Path

import easy_vqa
from datasets import Dataset, Features, Image, List, Value

HERE = Path(__file__).parent
FEATURES = Features({"image_id": Value("int32"), "image": Image(), "questions": List(Value("string")),
                     "answers": List(Value("string"))})
COUNTS = {"train": (4_000, 38_575), "test": (1_000, 9_673)}     # images, questions: the package's README


def rows(split):
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    pairs = {i: ([], []) for i in sorted(paths)}
    for question, answer, image_id in zip(*getattr(easy_vqa, f"get_{split}_questions")()):
        pairs[image_id][0].append(question)
        pairs[image_id][1].append(answer)
    for i, (questions, answers) in pairs.items():
        yield {"image_id": i, "image": {"bytes": Path(paths[i]).read_bytes(), "path": None},
               "questions": questions, "answers": answers}


def build(split):
    table = list(rows(split))
    counts = len(table), sum(len(r["questions"]) for r in table)
    if counts != COUNTS[split]:
        raise ValueError(f"easy-vqa {split}: got {counts} images and questions, need {COUNTS[split]}")
    data = Dataset.from_list(table, features=FEATURES)
    data.to_parquet(HERE / f"{split}.parquet")
    print(split, *counts, f"{(HERE / f'{split}.parquet').stat().st_size:,} bytes")


if __name__ == "__main__":
    if version("easy-vqa") != "1.0":
        raise SystemExit(f"easy-vqa {version('easy-vqa')} is installed, the data set is built from 1.0")
    for split in COUNTS:
        build(split)
