"""The documentation says what is true: its names, links, commands and options exist, and its marked code runs.

No documentation tool is needed here; `make docs` builds the site.
"""

import ast
import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest
import yaml

import zoo

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
GUIDES = sorted((DOCS / "guides").glob("*.md"))
RUNS = "<!-- runs -->"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def expand(page: Path) -> str:
    """Text of a page with the files that it includes."""
    return re.sub(r'^--8<-- "(.+)"$', lambda m: (ROOT / m[1]).read_text(), page.read_text(), flags=re.MULTILINE)


def blocks(page: Path, language: str) -> list[tuple[bool, str]]:
    """Fenced blocks of a language, and whether each is marked to be run."""
    found = re.findall(rf"^({RUNS}\n)?```(\w*)\n(.*?)^```$", expand(page), re.MULTILINE | re.DOTALL)
    return [(bool(mark), code) for mark, kind, code in found if kind == language]


def resolve(name: str) -> object:
    """What code means by a dotted name: an attribute, or else a module that may not be imported yet."""
    first, *rest = name.split(".")
    found, path = importlib.import_module(first), first
    for part in rest:
        path = f"{path}.{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
    return found


def api_entries() -> dict[str, list[str] | None]:
    """Modules on the pages of the API, each with the members that it shows; None: all public ones."""
    entries = {}
    for page in sorted((DOCS / "api").glob("*.md")):
        for name, options in re.findall(r"^::: (\S+)\n((?:    .*\n?)*)", page.read_text(), re.MULTILINE):
            members = (yaml.safe_load(options) or {"options": {}})["options"].get("members")
            entries[name] = members
    return entries


def documented() -> set[str]:
    """Names that have a heading on a page of the API."""
    names = set()
    for module, members in api_entries().items():
        found = members or [n for n in vars(importlib.import_module(module)) if not n.startswith("_")]
        names |= {module, *(f"{module}.{n}" for n in found)}
    return names


def headings(text: str) -> set[str]:
    """Anchors of a page, as Python-Markdown makes them."""
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", plain, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()

    def pages(entry):
        values = entry.values() if isinstance(entry, dict) else entry
        return [entry] if isinstance(entry, str) else [page for value in values for page in pages(value)]

    assert sorted(pages(yaml.safe_load(text)["nav"])) == [page.relative_to(DOCS).as_posix() for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = expand(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        # The front page is README.md, whose links start at the root of the checkout.
        place = next((p for p in (page.parent / path, ROOT / path) if p.is_file()), None) if path else page
        assert place is not None, f"{target} does not exist"
        assert not anchor or anchor in headings(expand(place)), f"{target}: no such heading"
    for reference in re.findall(r"\]\[(zoo\.[\w.]+)\]", text):
        assert reference in documented(), f"{reference} is on no page of the API"


def test_tables_of_models_are_whole():
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    models, speed = hooks.models_table().splitlines(), hooks.speed_table().splitlines()
    for lines in (models, speed):
        assert len({line.count("|") for line in lines}) == 1
    assert [line.split("`")[1] for line in models[2:]] == zoo.list_models()
    assert {"biformer_tiny", "agent_swin_tiny", "favit_b1", "halo_h0"} <= {line.split("`")[1] for line in speed[2:]}
    markers = re.findall("<!-- .+ -->", (DOCS / "models.md").read_text())
    assert markers == ["<!-- models -->", "<!-- speed -->"]


@pytest.mark.parametrize(("module", "members"), api_entries().items(), ids=list(api_entries()))
def test_the_api_exists_and_has_docstrings(module, members):
    found = importlib.import_module(module)
    assert inspect.getdoc(found)
    for name in members or []:
        member = getattr(found, name)
        # Elsewhere the builder would leave it out without a word.
        assert getattr(member, "__module__", module) == module, f"{name} is not defined in {module}"
        assert inspect.getdoc(member), f"{name} has no docstring"


def test_every_op_is_documented():
    shown = {name.rsplit(".", 1)[1] for name in documented()}
    assert set(zoo.kernels.__all__) <= shown


def imported(code: str) -> dict[str, str]:
    """Dotted names that a block binds by imports from this package."""
    names = {"zoo": "zoo"}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "zoo":
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.AST) -> str | None:
    """`a.b.c` of an attribute access."""
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return inner and f"{inner}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


@pytest.mark.parametrize("page", [*GUIDES, DOCS / "index.md"], ids=name_of)
def test_names_and_arguments_of_python_blocks_exist(page):
    names = {}
    for _, code in blocks(page, "python"):
        names |= imported(code)
        for name in names.values():
            resolve(name)
        for node in ast.walk(ast.parse(code)):
            if not isinstance(node, ast.Call):
                continue
            first, _, rest = (dotted(node.func) or "").partition(".")
            if first in names:
                called = resolve(f"{names[first]}.{rest}".rstrip("."))
                parameters = inspect.signature(called).parameters
                if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                    assert {k.arg for k in node.keywords} <= set(parameters), ast.unparse(node)


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_commands_parse(page):
    from zoo.bench import runner
    from zoo.cli import COMMANDS, PASS_THROUGH, _parser
    from zoo.train.configs import find_config

    own = {"my_classes.yaml"}
    for _, text in blocks(page, ""):
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["python", "-m"]:
                assert importlib.util.find_spec(words[2]), line
            if words[:1] != ["zoo"] or "|" in line:
                continue
            command, rest = words[1], words[2:]
            assert command in COMMANDS, line
            if command == "bench":
                for suite in runner.make_parser().parse_args(rest).suite:
                    assert suite in {path.stem for path in (ROOT / "benchmarks/suites").glob("*.yaml")}, line
            elif command in PASS_THROUGH:
                config = rest[rest.index("--config") + 1]
                assert config in own or find_config(config).is_file(), line
            else:
                _parser(command).parse_args(words[1:])


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_yaml_blocks_fit_their_classes(page):
    from zoo.train.checks import check_config

    for _, text in blocks(page, "yaml"):
        check_config(yaml.safe_load(text), name_of(page))


RUNNABLE = [page for page in GUIDES if any(mark for mark, _ in blocks(page, "python"))]


@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_marked_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = {}
    for mark, code in blocks(page, "python"):
        if mark:
            exec(compile(code, name_of(page), "exec"), space)
