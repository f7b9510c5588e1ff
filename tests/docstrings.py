"""What the docstring of a public name says; `python tests/docstrings.py [module ...]` prints what is missing, a test holds it empty.

Public names are the functions and classes of a module, and the methods of its classes, without a leading underscore. Each says

- what it does, in five words or more (methods of an `autograd.Function` and kernels of `triton.jit` are called by a machine: no rule);
- its errors: where it raises, or calls a function named check... or need..., the docstring says "Raises" or names the error;
- its shapes: where an argument is named as the course names its tensors, the docstring holds a shape as `(B, L, D)`, or the
  words "shape" or "scalar", or says "as `other_function`", where they stand;
- its source: a layer with a `forward` of its own names the paper, equation, official code or chapter it comes from, and so does
  at least one docstring of each module.
"""
import ast
import re
import sys
from pathlib import Path

LIBRARY = Path(__file__).resolve().parent.parent / "vlmamba_lite"
SEQUENCES = {"u", "delta", "A", "B", "C", "z", "x", "y", "h", "dt", "hidden", "order", "initial_state", "initial_states", "images", "tokens"}
MODEL = {"input_ids", "inputs_embeds", "attention_mask", "logits"}
TENSORS = {name: SEQUENCES | MODEL for name in ("connector", "language_model", "mamba", "mamba2", "msc", "scan", "scan_parallel", "scan_reference",
                                                "scan_triton", "ssd", "vision", "vss")}
A_SHAPE = re.compile(r"\([^()]*\b(?:[A-Z]\w*|\d+|length|batch|height)\b[^()]*,[^()]*\)|\([A-Z]\w*,?\)|\bshapes?\b|\bscalar|\bas `\w", re.DOTALL)
AN_ERROR = re.compile(r"\bRaises?\b|Error\b|\bfault|\bExit\b")
A_SOURCE = re.compile(r"arXiv|\bpaper|\beqs?\.|equation|Figure|section \d|table \d|official|mamba_ssm|transformers|released|algorithm \d|chapter|https?://", re.I)


def public_names(tree):
    "Name and syntax tree of each public function, class and method of a module, and the class of a method."
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node, None
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    yield f"{node.name}.{method.name}", method, node


def is_derivative(node):
    "A class whose methods PyTorch calls for automatic differentiation."
    return isinstance(node, ast.ClassDef) and any(ast.unparse(b).endswith("autograd.Function") for b in node.bases)


def called_by_a_machine(node, owner):
    "Whether PyTorch calls this method for automatic differentiation, or Triton compiles the function."
    return is_derivative(owner) or any("jit" in ast.unparse(d) for d in node.decorator_list)


def may_raise(function):
    "Whether a function raises by itself, or through a check that bears the name."
    raises = [n for n in ast.walk(function) if isinstance(n, ast.Raise) and n.exc is not None]
    calls = {n.func.id for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    return bool(raises) or any(re.match(r"_?(check|need)(_|$)", name) for name in calls)


def is_layer(node):
    "A class with a `forward` of its own that people call."
    return not is_derivative(node) and any(isinstance(m, ast.FunctionDef) and m.name == "forward" for m in node.body)


def missing_in(name, node, module):
    "What a docstring leaves out, as words."
    doc = ast.get_docstring(node) or ""
    if len(doc.split()) < 5:
        yield "five words on what it does" if doc else "a docstring"
    if isinstance(node, ast.ClassDef):
        if is_layer(node) and not A_SOURCE.search(doc):
            yield "its source (paper and equation or figure, official code, chapter)"
        return
    if may_raise(node) and not AN_ERROR.search(doc):
        yield "what it raises"
    tensors = {a.arg for a in node.args.args + node.args.kwonlyargs} & TENSORS.get(module, MODEL)
    if tensors and not A_SHAPE.search(doc):
        yield f"the shape of {', '.join(sorted(tensors))}"


def missing(path):
    "Everything the docstrings of a module leave out: lines `name: what`."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [(name, node) for name, node, owner in public_names(tree) if not called_by_a_machine(node, owner)]
    lines = [f"{name}: {what}" for name, node in names for what in missing_in(name, node, path.stem)]
    cited = any(A_SOURCE.search(ast.get_docstring(node) or "") for _, node in names)
    return lines if cited else [*lines, "no docstring of the module names a paper or other source"]


def modules():
    return sorted(p for p in LIBRARY.glob("*.py") if not p.name.startswith("_"))


if __name__ == "__main__":
    wanted = set(sys.argv[1:])
    for path in modules():
        if not wanted or path.stem in wanted:
            print(f"{path.stem}: {len(missing(path))}", *missing(path), sep="\n    ")
