"""Everything public is documented to the last parameter, and the API page made of it leads nowhere astray."""

import ast
import builtins
import functools
import importlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pdoc
import pytest

import melfusion_pipeline

PACKAGE = Path(melfusion_pipeline.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("[a-z]*.py"))
# Symbols of the method: `l`, `t_0`, `C_I`, `alpha_l`.
SYMBOL = re.compile(r"(alpha|[A-Za-z])(_[A-Za-z0-9])?")
# In backticks too: arguments, columns, classes and files of other projects.
FOREIGN = {"Cnn14", "DataLoader", "end_s", "model", "model_index.json", "start_s", "variant", "ytid"}
ARRAYS = re.compile(r"Tensor|ndarray")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Documented(NamedTuple):
    """A public class, function or method and its docstring."""

    name: str
    node: ast.AST
    docstring: str

    @property
    def parameters(self) -> list[str]:
        """The parameters of a function or of a class's `__init__`, or the fields of a class without one."""
        if isinstance(self.node, FUNCTIONS):
            arguments = self.node.args
            given = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
            return [argument.arg for argument in given if argument and argument.arg not in ("self", "cls")]
        init = [item for item in self.node.body if getattr(item, "name", None) == "__init__"]
        if init:
            return Documented(self.name, init[0], self.docstring).parameters
        return [item.target.id for item in self.node.body if isinstance(item, ast.AnnAssign)]

    @property
    def is_property(self) -> bool:
        return any("property" in ast.unparse(decorator) for decorator in self.node.decorator_list)

    def names(self, parameter: str) -> bool:
        """Whether the docstring says what a parameter is: in its section, or in its text in backticks."""
        section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", self.docstring, re.DOTALL | re.MULTILINE)
        listed = re.search(rf"^ +[\w*, ]*\b{parameter}\b[\w*, ]*:", section[1], re.MULTILINE) if section else None
        return bool(listed) or f"`{parameter}`" in self.docstring


@functools.cache
def documented(module: str) -> dict[str, Documented]:
    """Everything public of a module by its qualified name."""
    found = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for item in getattr(node, "body", []):
            if not isinstance(item, (*FUNCTIONS, ast.ClassDef)):
                continue
            name, docstring = f"{prefix}{item.name}", ast.get_docstring(item) or ""
            # `@public` is pdoc's mark for a name that is on the page in spite of its underscore.
            if item.name.startswith("_") and item.name != "__call__" and "@public" not in docstring:
                continue
            found[name] = Documented(name, item, docstring)
            if isinstance(item, ast.ClassDef):
                visit(item, f"{name}.")

    visit(ast.parse((PACKAGE / f"{module}.py").read_text()), "")
    return found


def delegates(entry: Documented, entries: dict[str, Documented]) -> list[Documented]:
    """What a docstring refers to: arguments that are explained there need not be explained twice."""
    references = re.findall(r"`([\w.]+)`", entry.docstring)
    return [other for name, other in entries.items() if {name, name.rpartition(".")[2]} & set(references)]


def find_gaps(module: str) -> list[str]:
    """Lists what the docstrings of a module do not tell."""
    entries, gaps = documented(module), []
    for entry in entries.values():
        known = [entry, *delegates(entry, entries)]
        # What is handed on whole is explained where it goes to, such as `torch.Tensor.to`.
        handed_on = {"args", "kwargs"} if re.search(r"`\w+\.[\w.]+`", entry.docstring) else set()
        if not entry.docstring:
            gaps.append(f"{module}.{entry.name} has no docstring")
            continue
        for parameter in entry.parameters:
            if parameter not in handed_on and not any(other.names(parameter) for other in known):
                gaps.append(f"{module}.{entry.name} does not say what {parameter} is")
        if isinstance(entry.node, FUNCTIONS):
            gaps += [f"{module}.{entry.name} {gap}" for gap in find_function_gaps(entry, known)]
    return gaps


def find_function_gaps(entry: Documented, known: list[Documented]) -> list[str]:
    text, gaps = "\n".join(other.docstring for other in known), []
    for node in ast.walk(entry.node):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            if node.exc.func.id not in text:
                gaps.append(f"does not say that it raises {node.exc.func.id}")
    returned = ast.unparse(entry.node.returns) if entry.node.returns else "None"
    sections = re.findall(r"^(Args|Raises|Returns|Yields):$", entry.docstring, re.MULTILINE)
    says = {"Returns", "Yields"} & {*sections, entry.docstring.split()[0]} or entry.docstring.startswith("Gives")
    if sections and not says and returned not in ("None", "Iterator[None]") and not entry.is_property:
        gaps.append("does not say what it returns")
    annotations = [returned, *(ast.unparse(node.annotation) for node in ast.walk(entry.node.args) if has_type(node))]
    if ARRAYS.search(" ".join(annotations)) and not re.search(r"\[[^\]]*\]|shape", text):
        gaps.append("tells no shape")
    return gaps


def has_type(node: ast.AST) -> bool:
    return isinstance(node, ast.arg) and node.annotation is not None


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_is_documented_completely(module):
    assert len(documented(module)) >= 1
    assert find_gaps(module) == []


# ---------------------------------------- references


@functools.cache
def vocabulary() -> set[str]:
    """Every identifier and every short text that the package's code holds, docstrings aside."""
    found = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            for field in ("id", "attr", "arg", "name", "module"):
                found.update(re.findall(r"\w+", str(getattr(node, field, None) or "")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 60:
                found.update(re.findall(r"\w+", node.value))
    return found


def is_found(reference: str, module: str) -> bool:
    """Whether a name in backticks stands for something that there is."""
    if reference.removeprefix("melfusion_pipeline.") in MODULES:
        return True
    namespace = vars(importlib.import_module(f"melfusion_pipeline.{module}".removesuffix(".__init__")))
    head, *rest = reference.split(".")
    target = namespace.get(head, getattr(builtins, head, None))
    if target is None:
        try:
            target = importlib.import_module(head)
        except ImportError:
            return set(reference.split(".")) <= vocabulary()
    for name in rest:
        if not hasattr(target, name):
            # Attributes of instances and submodules not imported yet.
            return name in vocabulary()
        target = getattr(target, name)
    return True


def test_the_package_says_what_each_module_holds():
    assert sorted(re.findall(r"^\| `melfusion_pipeline\.(\w+)` \|", melfusion_pipeline.__doc__, re.M)) == MODULES


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_names_in_backticks_are_those_of_something_that_exists(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    owners = [tree, *(entry.node for entry in documented(module).values())]
    text = "\n".join(ast.get_docstring(owner) or "" for owner in owners)
    references = set(re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)`", text))
    references = {name for name in references - FOREIGN if not SYMBOL.fullmatch(name)}
    assert [name for name in sorted(references) if not is_found(name, module)] == []


# ---------------------------------------- the page


class Page(HTMLParser):
    """The addresses and the anchors of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.anchors = set(), set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        attributes = dict(attributes)
        self.anchors |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        if tag in ("a", "img", "script", "link"):
            self.links |= {attributes[name] for name in ("href", "src") if attributes.get(name)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[Path, Page]:
    """The pages of `make docs`, without the listings of the source, which are three quarters of them."""
    folder = tmp_path_factory.mktemp("docs")
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc("melfusion_pipeline", *(f"melfusion_pipeline.{module}" for module in MODULES), output_directory=folder)
    return {path: Page(path.read_text()) for path in folder.rglob("*.html")}


def find_broken_links(pages: dict[Path, Page]) -> list[str]:
    broken = []
    for path, page in pages.items():
        for link in page.links:
            address, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", address):
                continue
            target = (path.parent / unquote(address)).resolve() if address else path
            missing = not target.is_file() if target not in pages else anchor and anchor not in pages[target].anchors
            broken += [f"{path.name}: {link}"] if missing else []
    return broken


def test_every_module_has_a_page_with_everything_public_on_it(pages):
    by_name = {path.relative_to(path.parents[1]).as_posix(): page for path, page in pages.items()}
    for module in MODULES:
        page = by_name[f"melfusion_pipeline/{module}.html"]
        missing = [name for name in documented(module) if not name.endswith("__call__") and name not in page.anchors]
        assert missing == []


def test_no_link_of_the_pages_is_broken(pages):
    assert sum(len(page.links) for page in pages.values()) > 100
    assert find_broken_links(pages) == []


def test_a_broken_link_would_be_found(pages):
    path = next(path for path in pages if path.name == "audio.html")
    text = path.read_text().replace("</body>", '<a href="#no_such_name"></a><a href="nowhere.html"></a></body>')
    found = find_broken_links(pages | {path: Page(text)})
    assert sorted(found) == ["audio.html: #no_such_name", "audio.html: nowhere.html"]
