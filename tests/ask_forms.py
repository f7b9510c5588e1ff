"""Asks trained models easy-VQA's test questions as people type them, and writes data/results/question_forms.json.

    python tests/ask_forms.py runs/lite-seed0 runs/lite-seed3
"""
import sys
import time
from dataclasses import replace
from pathlib import Path

from vlmamba_lite.data.easy_vqa import build_set, load_easy_vqa
from vlmamba_lite.evaluation.answers import evaluate, share_interval
from vlmamba_lite.files import read_json
from vlmamba_lite.model.vlmamba import VLMamba
from vlmamba_lite.training.results import write_result

ROOT = Path(__file__).resolve().parent.parent
FORMS = {"as written": str, "without ?": lambda text: text.rstrip("?"), "capitals": str.upper,
         "two spaces": lambda text: text.replace(" ", "  "), "full stop": lambda text: text.rstrip("?") + ".",
         "British": lambda text: text.replace("color", "colour").replace("gray", "grey")}


def main(folders):
    rows, runs = load_easy_vqa("test"), []
    for folder in map(Path, folders):
        model, trained = VLMamba.from_pretrained(folder), read_json(folder / "result.json")
        data = build_set(rows, model.tokenizer)
        for form, change in FORMS.items():
            questions, began = [change(text) for text in data.questions], time.process_time()
            changed = sum(a != b for a, b in zip(questions, data.questions))
            scores = evaluate(model, replace(data, questions=questions))
            runs.append(dict(seed=trained["seed"], trained_with=trained["commit"], form=form, example=questions[0],
                             questions=len(questions), changed=changed, accuracy=scores,
                             interval=share_interval(scores["all"], len(questions)),
                             cpu_seconds=round(time.process_time() - began, 1)))
            print(f"seed {trained['seed']}, {form}: {100 * scores['all']:.2f} %, {changed} of {len(questions)} changed",
                  flush=True)
    write_result(ROOT / "data/results/question_forms.json", preset="lite", seed=[*dict.fromkeys(run["seed"] for run in runs)],
                 runs=runs)


if __name__ == "__main__":
    main(sys.argv[1:])
