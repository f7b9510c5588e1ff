"""The form of the library, as bars that a change may not pass:  python tests/form.py  prints what does and exits with 1.

What code does is for the tests; `ruff check` (ruff.toml) finds unused names and other slips.
"""
import ast
import importlib
import inspect
import sys
from collections import defaultdict

import house
from house import LIBRARY, ROOT

MODULE_LINES, WIDTH, FUNCTION_LINES = 500, 120, 60
LIBRARY_LINES = 14_200                  # with all that was added since; on the way to 10,500 it may fall, not rise
ONE_PAGE = "one_page"                  # 250 lines, explained in the text around them
LONG = {"ops.triton"}                   # kernels unroll what a language without functions of functions cannot say


def lines_of(module):
    return house.files()[module].read_text(encoding="utf-8").splitlines()


def too_many_lines():
    "The library as a whole, and each module."
    counts = {module: len(lines_of(module)) for module in house.files()}
    if sum(counts.values()) > LIBRARY_LINES:
        yield f"the library has {sum(counts.values()):,} lines, at most {LIBRARY_LINES:,}"
    for module, count in counts.items():
        if count > MODULE_LINES and module not in LONG:
            yield f"{module} has {count} lines, at most {MODULE_LINES}"


def too_wide():
    "Lines of modules, but for those that nbdev writes: the title line and __all__. (Ruff's E501 would take them, too.)"
    for module in house.modules():
        lines, tree = lines_of(module), house.tree_of(module)
        written = next((node.end_lineno for node in tree.body if isinstance(node, ast.Assign)), 0) if house.public_names(module) else 0
        for i, line in enumerate(lines, 1):
            if len(line) > WIDTH and i > written:
                yield f"{module}:{i} has {len(line)} characters, at most {WIDTH}"


def long_functions():
    "A function is one idea: about a screen."
    for module in house.modules():
        for node in ast.walk(house.tree_of(module)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > FUNCTION_LINES and module not in LONG:
                yield f"{module}.{node.name} has {node.end_lineno - node.lineno + 1} lines, at most {FUNCTION_LINES}"


def own_classes():
    "{name: class} of all classes that modules of the library define; the modules are imported."
    found = {}
    for module in house.modules():
        try:
            loaded = importlib.import_module(f"{house.PACKAGE}.{module}")
        except ModuleNotFoundError as error:                            # an extra that is not installed
            print(f"{module} was not looked into: {error}", file=sys.stderr)
            continue
        found |= {f"{module}.{name}": thing for name, thing in vars(loaded).items()
                  if inspect.isclass(thing) and thing.__module__ == loaded.__name__}
    return found


def ladders():
    "Classes with more than one own class above them, and mixins."
    for name, cls in own_classes().items():
        above = [base.__name__ for base in cls.__mro__[1:] if base.__module__.startswith(house.PACKAGE)]
        if len(above) > 1:
            yield f"{name} stands on {', '.join(above)}, at most one own class"
        if "Mixin" in cls.__name__:
            yield f"{name}: no mixins"


def pieces():
    "A class that is written in pieces: attributes set on it, or on a class beside it, at the top of a module."
    for module in house.modules():
        classes = {node.name for node in house.tree_of(module).body if isinstance(node, ast.ClassDef)}
        for node in house.tree_of(module).body:
            for target in getattr(node, "targets", []):
                if isinstance(target, ast.Attribute) and getattr(target.value, "id", None) in classes:
                    yield f"{module}:{node.lineno} sets {ast.unparse(target)} outside its class"


def names_twice():
    "A public name that two modules define."
    owners = defaultdict(list)
    for module in house.modules():
        for name in house.public_names(module) if module != ONE_PAGE else ():      # it writes anew what others define
            owners[name].append(module)
    for name, modules in sorted(owners.items()):
        if len(modules) > 1:
            yield f"{name} is defined in {' and '.join(modules)}"


def undocumented():
    "Public functions, classes and methods without a docstring; PyTorch and Triton call some by themselves."
    for module in house.modules():
        for name, node, owner in house.definitions(module):
            called = module == ONE_PAGE or house.is_derivative(owner) or any("jit" in ast.unparse(d) for d in node.decorator_list)
            if not called and not ast.get_docstring(node):
                yield f"{module}.{name} has no docstring"


RULES = (too_many_lines, too_wide, long_functions, ladders, pieces, names_twice, undocumented)


def main():
    sys.path.insert(0, str(ROOT))
    found = 0
    for rule in RULES:
        lines = list(rule())
        found += len(lines)
        print(f"{rule.__name__}: {len(lines)}", *lines, sep="\n    ")
    total = sum(len(lines_of(module)) for module in house.files())
    print(f"\n{LIBRARY.name}: {total:,} lines in {len(house.modules())} modules")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
