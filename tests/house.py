"""The house as files: pages (notebooks by their path below nbs), modules, rooms in floor order, and which module imports which.

Shared by test_repository.py, test_site.py, form.py and refresh.py. Nothing of the library is imported: all is read from syntax trees.
"""
import ast
import re
from functools import cache
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS, LIBRARY, PACKAGE = ROOT / "nbs", ROOT / "vlmamba_lite", "vlmamba_lite"
# Imports run downhill: a room imports from itself and from those before it. exercises, one_page and files are single modules.
ROOMS = ("exercises", "one_page", "files", "ops", "layers", "language", "vision", "connectors", "data", "model", "training", "evaluation", "hf", "cli")


# Pages

@cache
def pages():
    "All notebooks, as paths below nbs without suffix: index, ops/01_reference, ops/triton."
    paths = [p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    return sorted(p.relative_to(NBS).with_suffix("").as_posix() for p in paths)


def number(page):
    "The number of a course chapter; None for a workshop notebook."
    found = re.match(r"(\d\d)_", page.rpartition("/")[2])
    return found and int(found[1])


def chapters():
    "The numbered pages in reading order."
    return sorted((page for page in pages() if number(page) is not None), key=number)


def path_of(page):
    return NBS / f"{page}.ipynb"


@cache
def read(page):
    "A page's notebook, read once for all tests, which do not change it."
    return nbformat.read(path_of(page), as_version=4)


def html_of(page):
    "The page of the site: nbdev leaves the number out."
    room, _, name = page.rpartition("/")
    return f"{room}/" * bool(room) + re.sub(r"^\d+_", "", name) + ".html"


@cache
def module_of(page):
    "The module a notebook exports, ops.reference; None where it exports none."
    found = (re.search(r"^#\|\s*default_exp (\S+)", cell.source, re.MULTILINE) for cell in read(page).cells)
    return next((match[1] for match in found if match), None)


def page_of(module):
    "The notebook of a module; None where it has none."
    return next((page for page in pages() if module_of(page) == module), None)


# Modules

@cache
def files():
    "Every Python file of the library but _modidx, by its dotted name; packages by theirs, the library itself as ''."
    found = {}
    for path in sorted(LIBRARY.rglob("*.py")):
        parts = path.relative_to(LIBRARY).with_suffix("").parts
        if parts != ("_modidx",):
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def modules():
    "The modules that notebooks export, in the order of the rooms, chapters first in each."
    names = [name for name, path in files().items() if path.name not in ("__init__.py", "__main__.py")]

    def place(name):
        page = page_of(name)
        return floor(name), number(page) if page and number(page) is not None else 100, name
    return sorted(names, key=place)


def floor(module):
    "The floor of a module's room; above all others where it has no room."
    room = module.partition(".")[0]
    return ROOMS.index(room) if room in ROOMS else len(ROOMS)


@cache
def tree_of(module):
    return ast.parse(files()[module].read_text(encoding="utf-8"))


@cache
def public_names(module):
    "The names in a module's __all__, as it is written; empty where it has none."
    for node in tree_of(module).body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", None) == "__all__" for target in node.targets):
            return tuple(ast.literal_eval(node.value))
    return ()


def definitions(module):
    "(name, syntax tree, class of a method or None) of each public function, class and method of a module."
    for node in tree_of(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node, None
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    yield f"{node.name}.{method.name}", method, node


def is_derivative(node):
    "A class whose methods PyTorch calls for automatic differentiation."
    return isinstance(node, ast.ClassDef) and any(ast.unparse(b).endswith("autograd.Function") for b in node.bases)


# Imports

HIDDEN = {"import_module", "__import__"}
COMPUTED = "a module whose name is computed"


def absolute(name, level, package):
    "The absolute name of a relative import inside a package."
    if not level:
        return name
    parts = package.split(".")
    return ".".join([*parts[:len(parts) - level + 1], *([name] if name else [])])


def inside(name):
    "The module of the library that a dotted name leads to, as ops.reference; None for a name outside the library."
    if name != PACKAGE and not name.startswith(f"{PACKAGE}."):
        return None
    name = name[len(PACKAGE) + 1:]
    while name and name not in files():                      # a name in a module: the module it is in
        name = name.rpartition(".")[0]
    return name


def text_of(node, package):
    "What an argument of import_module says, as far as it is constant; None where nothing is."
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
    elif isinstance(node, ast.JoinedStr):
        text = next((v.value for v in node.values[:1] if isinstance(v, ast.Constant)), None)
    elif isinstance(node, ast.BinOp):
        return text_of(node.left, package)
    else:
        text = None
    if text and text.startswith("."):
        dots = len(text) - len(text.lstrip("."))
        text = absolute(text[dots:], dots, package)
    return text


def imports(tree, package=""):
    "The modules of the library that some code imports, wherever the import stands, strings of import_module among them."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {inside(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = absolute(node.module or "", node.level, package)
            targets = {inside(f"{name}.{alias.name}") for alias in node.names}
            found |= {owner(alias.name) for alias in node.names} if name == PACKAGE and targets == {""} else targets
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            text = text_of(node.args[0], package) if called in HIDDEN else None
            if text and text.endswith("."):
                found.add(COMPUTED if inside(text[:-1]) is not None else None)
            elif text:
                found.add(inside(text))
    return found - {None}


def owner(name):
    "The module whose public name this is; '' for what the library itself holds, as __version__."
    return next((module for module in modules() if name in public_names(module)), "")


@cache
def module_imports(module):
    "The modules of the library that a module imports, without the library itself."
    path = files()[module]
    package = path.parent.relative_to(ROOT).as_posix().replace("/", ".")
    return frozenset(imports(tree_of(module), package) - {"", module})


@cache
def page_imports(page):
    "The modules of the library that the code cells of a notebook import."
    return frozenset(imports(ast.parse(page_code(page))) - {"", COMPUTED})


def page_code(page):
    "The code of a notebook as a module: lines of magic are left out."
    cells = [cell.source for cell in read(page).cells if cell.cell_type == "code" and not cell.source.lstrip().startswith("%%")]
    return "\n\n".join(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE) for source in cells)


@cache
def needs(module):
    "All modules that a module needs, itself among them."
    found, open_ = set(), [module]
    while open_:
        name = open_.pop()
        if name not in found:
            found.add(name)
            open_ += module_imports(name) - {COMPUTED}
    return frozenset(found)


# The rules of import

def uphill():
    "Imports of modules that run uphill, lead to a room and not to a module, or into a room that is none."
    for module in modules():
        for other in sorted(module_imports(module)):
            if other == COMPUTED:
                yield f"{module} imports {other}"
            elif floor(module) == len(ROOMS) or floor(other) == len(ROOMS):
                yield f"{module} imports {other}: one of them stands in no room"
            elif floor(other) > floor(module):
                yield f"{module} imports {other}, of a room further down"
            elif files()[other].name == "__init__.py":
                yield f"{module} imports the room {other}, not a module of it"
    if "one_page" in files() and module_imports("one_page"):
        yield "one_page imports from the library"


def circles():
    "Circles of imports between modules, each as the path that leads back."
    done = set()

    def visit(module, path):
        if module in path:
            yield " -> ".join([*path[path.index(module):], module])
        elif module not in done:
            for other in sorted(module_imports(module) - {COMPUTED}):
                yield from visit(other, [*path, module])
            done.add(module)
    for module in files():
        yield from visit(module, [])


def reading_order():
    "Imports in numbered notebooks of chapters that come later, and of workshop modules of rooms further down."
    for page in chapters():
        module = module_of(page)
        for other in sorted(page_imports(page) - {module}):
            other_page = page_of(other)
            if other_page is None or number(other_page) is None:
                if module and floor(other) > floor(module):
                    yield f"{page} imports {other}, of a room further down"
            elif number(other_page) >= number(page):
                yield f"{page} imports {other}, which is chapter {number(other_page):02}"
