"""What the documentation shows works: blocks run, commands and keys exist, reasons for skipping are few."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmssl.config import Config, load_config, parse_config
from scripts.bench.__main__ import app as bench_app
from tests.helpers import docs_commands as commands
from tests.helpers.docs_blocks import PAGES, REASONS, ROOT, Block, blocks
from tests.helpers.docs_scripts import load_script
from tests.helpers.docs_stage import make_stage, make_stock, run_block

BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
RUNNING = [page for page in PAGES if any(b.language != "yaml" and b.skip is None for b in blocks(page))]
SECTIONS = set(Config.model_fields)
FILES = (".py", ".md", ".json", ".safetensors")


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stages are made of."""
    return make_stock(tmp_path_factory.mktemp("stock"))


def run_page(page: Path, stock: Path, folder: Path, *, slow: bool) -> None:
    """Run the blocks of a page in order."""
    stage = make_stage(stock, folder / "stage", tutorial="tutorials" in page.parts)
    names: dict[str, Any] = {"__name__": "__docs__"}
    for block in blocks(page):
        runs = block.language != "yaml" or block.file is not None
        if runs and block.skip is None and (slow or not block.slow):
            run_block(block, stage, names)


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(page: Path, stock: Path, tmp_path: Path) -> None:
    """In order, in one folder; what a block changes is there for the next."""
    run_page(page, stock, tmp_path, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in RUNNING if any(b.slow for b in blocks(p))], ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_slow_blocks_of_a_page_run_too(page: Path, stock: Path, tmp_path: Path) -> None:
    """The same with those that take longer."""
    run_page(page, stock, tmp_path, slow=True)


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_exist(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `mmssl` command of a shell block, whether it runs or not, has a verb, options and keys that exist. Files
    that the page has its readers save are there."""
    monkeypatch.chdir(tmp_path)
    for saved in blocks(block.page):
        if saved.file is not None:
            run_block(saved, tmp_path, {})
    for line in commands.lines(block.code):
        words = commands.arguments(line)
        if words is not None and "..." not in words:
            commands.check(words)
        words = commands.bench_arguments(line)
        if words is not None and "..." not in words:
            commands.check(words, bench_app)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_the_text_names_exists(page: Path) -> None:
    """Verbs, options and configuration keys within the text exist too."""
    names = {
        name for block in blocks(page, "python") for name in re.findall(r"^(\w+)\b.* = ", block.code, re.MULTILINE)
    }
    for code in commands.inline_code(page):
        if code.startswith(("mmssl ", "python -m mmssl ")):
            words = shlex.split(code)
            words = words[words.index("mmssl") + 1 :]
            known = commands.options_of(words)
            assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, code
        bench = commands.bench_arguments(code) if code.startswith("python -m ") else None
        if bench:
            known = commands.options_of(bench, bench_app)
            assert {word.partition("=")[0] for word in bench if word.startswith("--")} <= known, code
        key = re.match(r"((?:\w+\.)+\w+)([=:]|$)", code)
        # `model.vision` alone may be an attribute on a page whose Python has a `model`.
        if key is not None and key[1].split(".")[0] in SECTIONS - (set() if key[2] else names):
            assert key[1].endswith(FILES) or is_key(key[1]), f"{page.name}: there is no setting {key[1]}"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=str)
def test_settings_are_accepted(block: Block) -> None:
    """A YAML block is a part of a configuration that is valid."""
    base = load_config(ROOT / "configs" / "small.yaml").model_dump(mode="json")
    tree = yaml.safe_load(block.code)
    assert tree
    if block.file is not None:  # a whole one
        parse_config(tree, str(block))
        return
    parse_config({**base, **{key: merged(base.get(key), value) for key, value in tree.items()}}, str(block))


def test_blocks_are_skipped_for_hardware_network_or_length_alone() -> None:
    """Every reason is one of these; and more blocks run than are skipped."""
    skipped = [block for block in BLOCKS if block.skip is not None]
    for block in skipped:
        assert re.fullmatch(REASONS, block.skip or ""), f"{block}: {block.skip}"
    run = [block for block in BLOCKS if block.language != "yaml" and block.skip is None]
    assert len(run) > len(skipped)


def test_rules_are_read(tmp_path: Path) -> None:
    """A rule reaches the block behind it and no other; an unknown one, or a change of what is not there, is refused."""
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- test: slow; with a -> b, c -> d -->\n```bash\na c\n```\n\n- item\n\n  ```python\n  a\n  ```\n"
    )
    first, second = blocks(page)
    assert (first.tested, first.slow, first.line, second.tested, second.slow) == ("b d\n", True, 3, "a\n", False)
    page.write_text("<!-- test: save as my_lab/a.py; with a -> b -->\n```python\na\n```\n")
    (saved,) = blocks(page)
    run_block(saved, tmp_path, {})
    assert (tmp_path / "my_lab" / "a.py").read_text() == "b\n"
    page.write_text("<!-- test: never -->\n```bash\na\n```\n")
    with pytest.raises(ValueError, match="never"):
        blocks(page)


@pytest.mark.parametrize(
    "line", ["mmssl trane x", "mmssl eval a b --tusk c", "mmssl show x optim.lrr=1", "torchrun -m mmssl embed a --out"]
)
def test_mistakes_are_found(line: str) -> None:
    """A wrong verb, option or key of a command does not pass."""
    words = commands.arguments(line)
    assert words is not None
    with pytest.raises(Exception, match=r"trane|--tusk|optim\.lrr|--out"):
        commands.check(words)


def is_key(key: str) -> bool:
    """Whether a dotted key is one of the configuration's, with any name where names are free."""
    return any(re.fullmatch(pattern, key) for pattern in KEYS)


KEYS = [re.escape(key).replace("NAME", r"\w+") for key in load_script("docs_reference").dotted_keys()]
KEYS += [r"data\.views\.\w+", r"evaluate\.suites\.\w+"]
KEYS += [r"objectives\.\w+(\.\w+)*", r"model\.vision\.options\.\w+", r"model\.text\.config\.\w+"]


def merged(base: Any, change: Any) -> Any:
    """A tree with the entries of another put over it."""
    if isinstance(base, dict) and isinstance(change, dict):
        return {**base, **{key: merged(base.get(key), value) for key, value in change.items()}}
    return change
