"""Does a model answer the same where it was exported to? Exports one, asks 200 questions there and here, and writes data/results/export/.

    python tests/export_answers.py runs/lite_seed0

The questions are those about easy-VQA's validation pictures; int8 is also measured on all of them, and on the time of a step of mamba-130m's shape.
"""
import argparse
import tempfile
import time
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np
import torch
from measures import lively
from PIL import Image

from vlmamba_lite import VLMamba
from vlmamba_lite.data.easy_vqa import build_set, load_easy_vqa
from vlmamba_lite.evaluation.answers import accuracy, answer_all
from vlmamba_lite.language.model import MambaConfig, MambaLM
from vlmamba_lite.model.chat import PromptFormat
from vlmamba_lite.model.export_gguf import export_gguf, write_gguf
from vlmamba_lite.model.export_llava import export_llava
from vlmamba_lite.model.export_onnx import StepGraph, export_onnx, open_onnx, plain_forms, write_onnx
from vlmamba_lite.model.presets import VLMambaConfig
from vlmamba_lite.training.results import write_result

ROOT = Path(__file__).resolve().parent.parent


def picture_of(data, row):
    return Image.fromarray(data.images[data.image_of[row]].permute(1, 2, 0).numpy())


def pick(data, count, seed=0):
    return np.random.default_rng(seed).permutation(len(data.questions))[:count]


def equal(got, want):
    return dict(questions=len(want), equal=sum(a == b for a, b in zip(got, want)), different_answers=len(set(want)))


def through_onnx(model, data, folder, count):
    "Answers of both forms: the first `count` one by one, int8 and float32 on all."
    found = {}
    for name, int8 in (("float32", False), ("int8", True)):
        export_onnx(model, folder / name, int8)
        (read, ask), state = open_onnx(folder / name), cache(lambda i: read(Image.fromarray(data.images[i].permute(1, 2, 0).numpy())))
        rows = pick(data, count) if not int8 else range(len(data.questions))
        got = [ask(state(data.image_of[row]), data.questions[row]) for row in rows]
        found[name] = dict(bytes=sum(path.stat().st_size for path in (folder / name).glob("*.onnx")))
        if int8:
            found[name] |= dict(accuracy=accuracy(got, data.answers))
        else:
            found[name] |= equal(got, [model.ask(picture_of(data, row), data.questions[row]) for row in rows])
            found[name]["accuracy"] = accuracy(answer_all(model, data), data.answers)
    return found


def llama(path):
    "A function of (prompt, tokens): token numbers that llama.cpp writes greedily."
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(path), 512, 1, 0
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads, cpu.poll = 1, 0                                 # idle threads sleep
    server = xllamacpp.Server(params)

    def write(prompt, tokens):
        said = server.handle_completions(dict(prompt=prompt, n_predict=tokens, temperature=0.0, n_probs=1))
        return [token["id"] for token in said["choices"][0]["logprobs"]["content"]]
    return write


def through_llama(model, data, folder, count):
    "The language model alone: questions as texts, and random token numbers for random models of both kinds, 32 tokens each."
    export_gguf(model, folder / "lite.gguf")
    write, prompt, got, want = llama(folder / "lite.gguf"), PromptFormat(model.tokenizer), [], []
    for row in pick(data, count):
        ids = prompt.encode(data.questions[row])
        want.append(model.language.generate(torch.tensor([ids]), 8, prompt.stops)[0, len(ids):].tolist())
        got.append(write(data.questions[row], 8))
    found = {"questions": equal(map(tuple, got), [*map(tuple, want)])}
    for mixer, args in (("mamba", {}), ("mamba2", dict(headdim=16, ngroups=2, d_state=32))):
        torch.manual_seed(0)
        lm = MambaLM(MambaConfig(64, 3, 97, mixer=mixer, mixer_args=args, embedding_std=0.3)).eval()
        write_gguf(lm, folder / "random.gguf")
        write, prompts = llama(folder / "random.gguf"), torch.randint(1, 97, (count, 20))
        want = [tuple(row.tolist()) for row in lm.generate(prompts, 32)[:, 20:]]
        got = [tuple(write(ids.tolist(), 32)) for ids in prompts]
        found[mixer] = equal(got, [w[:w.index(0) + 1] if 0 in w else w for w in want])            # 0 ends a text there
    return found


def through_llava(model, data, folder, count):
    "Random weights: a small SigLIP, an MLP and both Mambas; stock transformers answers."
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    found = {}
    for kind in ("siglip", "clip"):
        for mixer, args in (("mamba", {}), ("mamba2", dict(headdim=8, d_state=16))):
            torch.manual_seed(0)
            language = MambaConfig(32, 2, model.config.language.vocab_size, mixer=mixer, mixer_args=args, embedding_std=0.4)
            ours = VLMamba(VLMambaConfig(dict(kind=kind, config=f"tiny-{kind}"), "mlp", {}, language), model.tokenizer)
            ours = lively(ours).eval()
            export_llava(ours, folder / "llava")
            theirs, processor = (cls.from_pretrained(folder / "llava") for cls in (LlavaForConditionalGeneration, AutoProcessor))
            got, want, error = [], [], 0.0
            for row in pick(data, count):
                picture, question = picture_of(data, row), data.questions[row]
                inputs = processor(images=picture, text="<image>" + question, return_tensors="pt")
                said = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
                got.append(processor.decode(said, skip_special_tokens=True))
                want.append(ours.ask(picture, question))
                with torch.no_grad():
                    ids = PromptFormat(ours.tokenizer).encode(question)
                    x = torch.cat([ours.see(ours.pixels(picture)), ours.language.embed(torch.tensor([ids]))], 1)
                    logits = theirs(**inputs).logits[..., :language.vocab_size]
                    error = max(error, (logits - ours.language(inputs_embeds=x).logits).abs().max().item())
            found[f"{kind}, {mixer}"] = equal(got, want) | dict(largest_difference_of_logits=error)
    return found


def step_times(folder, repeats=20):
    "Milliseconds of one step, one thread, batch 1, of mamba-130m's and mamba2-130m's shape: ours, onnxruntime, int8; and megabytes."
    from onnxruntime import InferenceSession, SessionOptions
    options, found = SessionOptions(), {}
    options.intra_op_num_threads = 1
    torch.set_num_threads(1)
    for mixer, words, args in (("mamba", 50280, {}), ("mamba2", 50288, dict(d_state=128))):
        torch.manual_seed(0)
        lm = MambaLM(MambaConfig(vocab_size=words, mixer=mixer, mixer_args=args)).eval()
        step = StepGraph(plain_forms(lm))
        inputs, state = {"x": torch.randn(1, 768), **step.empty()}, [layer.mixer.empty_state(1) for layer in lm.backbone.layers]
        runs, size = {"ours": lambda: lm.step(torch.tensor([5]), state)}, {}
        for name, int8 in (("onnxruntime", False), ("onnxruntime int8", True)):
            path = folder / f"{mixer}-{int8}.onnx"
            write_onnx(step, path, inputs, ["logits", "next_conv", "next_ssm"], int8)
            session, given = InferenceSession(path, options), {name: x.numpy() for name, x in inputs.items()}
            runs[name], size[name] = (lambda session=session, given=given: session.run(None, given)), path.stat().st_size / 1e6
        spent = {name: [] for name in runs}
        with torch.no_grad():
            for _ in range(repeats + 2):                               # in turns; the first two warm up
                for name, run in runs.items():
                    began = time.perf_counter()
                    run()
                    spent[name].append(1e3 * (time.perf_counter() - began))
        found[mixer] = dict(milliseconds={name: median(times[2:]) for name, times in spent.items()},
                            fastest={name: min(times[2:]) for name, times in spent.items()}, megabytes=size)
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--parts", nargs="+", default=["llava", "gguf", "onnx", "step"])
    parser.add_argument("--output", type=Path, default=ROOT / "data/results/export", help="the folder of the result files")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = VLMamba.from_pretrained(given.model)
    data = build_set(load_easy_vqa("validation"), model.tokenizer)
    for name in given.parts:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            if name == "step":
                result = step_times(folder)
            else:
                part = dict(llava=through_llava, gguf=through_llama, onnx=through_onnx)[name]
                result = dict(model=str(given.model), forms=part(model, data, folder, given.count))
        print(name, result, flush=True)
        write_result(given.output / f"{name}.json", **result)


if __name__ == "__main__":
    main()
