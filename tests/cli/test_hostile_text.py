"""Nothing in the data reaches the terminal, a spreadsheet, a page or a card as a command."""

import ast
import csv
import io
import json
import re
import shutil
import sys
import tarfile
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.table import Table
from rich.text import Text

import mmssl
from mmssl import errors
from mmssl.apps.report.render import templates
from mmssl.cli import main
from mmssl.cli.common import VERBS
from mmssl.errors import UserError, printable
from mmssl.files import read_csv, write_csv
from tests.helpers.tiny_runs import run_tree

ROOT = Path(mmssl.__file__).parent
GOLDEN = Path(__file__).parents[1] / "golden" / "model"
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b31m\x90q\x9c\x08\x7f\r\u202eevil\u2066x\u2069[/b][red]"
"""Sets the title, clears the screen, colours, begins a string, deletes, overwrites the line, turns the direction, and
is wrong markup of rich."""
DIRECTIONS = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}


def commands_in(text: str) -> set[str]:
    """Characters that a terminal obeys, by Unicode's own tables."""
    found = {c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t"}
    return found | {c for c in text if unicodedata.bidirectional(c) in DIRECTIONS}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hostile data set: shards, images, class names, a table and a folder of pairs, whose every name and text is
    HOSTILE; and a model."""
    home = tmp_path_factory.mktemp("stage")
    shutil.copytree(GOLDEN, home / "model")
    rng = np.random.default_rng(0)
    (home / "data").mkdir()
    (home / "photos").mkdir()
    bad = HOSTILE.replace("/", "").replace("\0", "")
    with tarfile.open(home / "data" / f"{bad}.tar", "w") as tar:
        for i in range(16):
            image = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(image, "PNG")
            record = json.dumps({HOSTILE: HOSTILE, "group": f"{HOSTILE}{i % 2}"})
            files = {"txt": f"{HOSTILE} {i}", "cls": str(i % 2), "json": record}
            members = {"png": image.getvalue(), **{name: text.encode() for name, text in files.items()}}
            if i == 3:
                members["png"] = b"junk"
            key = f"k{i}" if i > 1 else f"{bad}{i}"
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            if i != 3:
                (home / "photos" / f"{bad}{i}.png").write_bytes(image.getvalue())
                (home / "photos" / f"{bad}{i}.txt").write_text(f"{HOSTILE} {i}")
    shutil.copy(home / "photos" / f"{bad}0.png", home / f"{bad}.png")
    (home / "data" / "classnames.txt").write_text(f"{bad} one\n{bad} two".replace("\r", ""))
    with (home / f"{bad}.csv").open("w", newline="") as file:
        rows = [[f"photos/{bad}{i}.png", f"{HOSTILE} {i}"] for i in range(16)]
        csv.writer(file).writerows([["image", "caption"], *rows])
    tree = run_tree(home / "data", home / f"run{bad}", evaluate__suites={bad: {"data": str(home / "data" / "*.tar")}})
    tree["data"]["captions"] = ["{txt}"]
    tree["data"]["bad_samples"] = 1.0
    (home / f"{bad}.yaml").write_text(yaml.safe_dump(tree))
    return home


def words(home: Path, *arguments: str) -> list[str]:
    """Arguments with the names of the stage filled in."""
    bad = HOSTILE.replace("/", "")
    names = {"S": f"{home}/data/*.tar", "M": f"{home}/model", "I": f"{home}/{bad}.png", "H": HOSTILE, "B": bad}
    return [re.sub(r"<(\w)>", lambda m: names[m[1]], argument).replace("<.>", str(home)) for argument in arguments]


STEPS: dict[str, Sequence[str]] = {
    "shards index": ["shards", "index", "<S>"],
    "shards check": ["shards", "check", "<S>", "--image", "<.>/c.png"],
    "shards show": ["shards", "show", "<S>", "--out", "<.>/s<B>.png"],
    "shards show --key": ["shards", "show", "<S>", "--key", "k5"],
    "shards show --key missing": ["shards", "show", "<S>", "--key", "<H>"],
    "shards pack": ["shards", "pack", "<.>/photos", "--out", "<.>/packed<B>"],
    "shards pack table": ["shards", "pack", "<.>/<B>.csv", "--out", "<.>/table"],
    "tokenizer": ["tokenizer", "train", "<S>", "--out", "<.>/tokenizer<B>"],
    "doctor": ["doctor", "<S>"],
    "doctor --json": ["doctor", "<S>", "--json"],
    "show": ["show", "<.>/<B>.yaml"],
    "train": ["train", "<.>/<B>.yaml", "train.steps=2"],
    "report": ["report", "<.>/run<B>", "--out", "<.>/report", "--images", "4"],
    "eval": ["eval", "<M>", "<S>", "--slice-by", "group", "--out", "<.>/eval", "--json", "<.>/m.json"],
    "eval retrieval": ["eval", "<M>", "<S>", "--task", "retrieval", "--no-cache"],
    "eval label": ["eval", "<M>", "<S>", "--label", "<H>", "--no-cache"],
    "calibrate": ["calibrate", "<M>", "<S>"],
    "compare": ["compare", "<M>", "<.>/run<B>", "<S>"],
    "embed": ["embed", "<M>", "<S>", "--out", "<.>/index"],
    "search": ["search", "<M>", "<.>/index", "<H>", "--out", "<.>/hits.png"],
    "search --json": ["search", "<M>", "<.>/index", "red", "--json"],
    "search --where": ["search", "<M>", "<.>/index", "red", "--where", "<H>.=<H>"],
    "predict": ["predict", "<M>", "<I>", "--labels", "<H>,other"],
    "predict --json": ["predict", "<M>", "<I>", "--labels", "<H>,other", "--json"],
    "explain": ["explain", "<M>", "<I>", "<H>", "--out", "<.>/e.png", "--train", "<S>", "--method", "occlusion"],
    "finetune": ["finetune", "<M>", "<S>", "--out", "<.>/tuned<B>", "--no-cache"],
    "interpolate": ["interpolate", "<M>", "<M>", "--out", "<.>/between<B>"],
    "export": ["export", "<M>", "--format", "timm", "--out", "<.>/exported<B>"],
    "load-check": ["load-check", "<M>"],
    "presets": ["presets", "<H>"],
    "suites": ["suites", "<H>"],
    "towers": ["towers", "check", "<H>"],
    "serve": ["serve", "<M>", "<.>/<B>"],
    "ablate": ["ablate", "<.>/<B>.yaml", "<H>=<H>", "--out", "<.>/ablation"],
}
"""Commands over the stage, in the order in which one uses what another wrote."""
SILENT = {
    "shards index",
    "tokenizer",
    "doctor",
    "doctor --json",
    "interpolate",
    "report",
    "compare",
    "eval retrieval",
    "load-check",
}
"""Those that need not print any of the hostile text."""


@pytest.fixture(scope="module")
def printed(stage: Path) -> dict[str, str]:
    """What each command prints on both streams."""
    found = {}
    for name, arguments in STEPS.items():
        with pytest.MonkeyPatch.context() as patch:
            out, err = io.StringIO(), io.StringIO()
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            with pytest.raises(SystemExit):
                main(words(stage, *arguments))
        found[name] = out.getvalue() + err.getvalue()
    return found


def test_every_verb_is_among_them() -> None:
    """A new verb needs a step above."""
    verbs = {name or run.__name__ for _, name, run in VERBS if callable(run)}
    groups = {name for _, name, run in VERBS if not callable(run)}
    assert verbs | groups <= {arguments[0] for arguments in STEPS.values()}


@pytest.mark.parametrize("step", STEPS)
def test_no_verb_lets_data_control_the_terminal(step: str, printed: dict[str, str]) -> None:
    """Of the hostile text, no control character arrives; where the verb shows it, it is written out."""
    assert commands_in(printed[step]) == set()
    assert "Traceback" not in printed[step]
    assert step in SILENT or any(form in printed[step] for form in ("\\u001b]", "\\x1b]", "\\e]")), printed[step]


@pytest.mark.parametrize("step", ["doctor --json", "search --json", "predict --json"])
def test_json_stays_json(step: str, printed: dict[str, str]) -> None:
    """Escapes are those of JSON, so the text arrives whole."""
    start = re.search(r"^[\[{]", printed[step], re.MULTILINE)
    assert start is not None
    assert json.JSONDecoder().raw_decode(printed[step], start.start())[0]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize(
    "write",
    [
        lambda text: print(text, file=sys.stdout),
        lambda text: print(text, file=sys.stderr),
        lambda text: warnings.warn(text, stacklevel=1),
        lambda text: sys.stderr.writelines([text]),
        lambda text: sys.excepthook(ValueError, ValueError(text), None),
        lambda text: errors.console().print(text),
        lambda text: errors.console(stderr=True).print(Text(text)),
    ],
    ids=["print", "print to stderr", "warning", "lines", "traceback", "console", "console on stderr"],
)
def test_all_ways_to_print_are_clean(
    write: Callable[[str], object], stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside the block of the command line, whatever prints."""
    found = io.StringIO()
    monkeypatch.setattr(sys, stream, found)
    with errors.clean_streams(), warnings.catch_warnings():
        warnings.simplefilter("always")
        write(HOSTILE)
    assert commands_in(found.getvalue()) == set()


def test_a_console_keeps_its_own_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, colours of rich pass, those in data do not, in a table too; brackets are no markup."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    found = io.StringIO()
    monkeypatch.setattr(sys, "stdout", found)
    table = Table("name")
    table.add_row(Text(HOSTILE, style="red"))
    with errors.clean_streams():
        errors.console().print(table)
        errors.console().print(HOSTILE, style="blue")
    text = found.getvalue()
    assert "\x1b[31m" in text
    assert "\\u001b]0;" in text
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert "[/b][red]" in plain.partition("┘")[2].replace("\n", "")
    assert commands_in(plain) == set()


@given(st.text())
def test_printable_changes_control_characters_only(text: str) -> None:
    """Every other character stays; what is written out reads back as JSON does."""
    clean = printable(text)
    assert commands_in(clean) == set()
    assert commands_in(text) or clean == text
    if "\\" not in text:
        assert re.sub(r"\\u([0-9a-f]{4})", lambda m: chr(int(m[1], 16)), clean) == text


@given(st.text())
def test_an_error_is_one_clean_line(text: str) -> None:
    """Whatever name a message holds."""
    message = str(UserError(text))
    assert commands_in(message) == set()
    assert "\n" not in message


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''=1", "plain", "'", ""])
def test_a_spreadsheet_runs_no_cell(text: str, tmp_path: Path) -> None:
    """No cell of text begins like a formula; numbers stay; reading gives the text back, as a header and as a cell."""
    path = tmp_path / "t.csv"
    write_csv(path, ("a", text), [(text, -1), (text, None)])
    with path.open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row if cell not in ("-1", "a")]
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in cells)
    assert read_csv(path) == [{"a": text, text: "-1"}, {"a": text, text: ""}]


def test_a_card_shows_names_as_they_are() -> None:
    """Tags, links, code and cells of Markdown in names are escaped."""
    text = "<script>x</script> ![a](http://127.0.0.1/x) `b` | c \\ \n# d"
    filters = templates().filters
    shown = filters["md"](text)
    assert "\n" not in shown
    assert re.search(r"(?<!\\)[<>`|\[\]]", shown) is None
    assert re.search(r"`|(?<!\\)\||\n", filters["code"](text)) is None


def test_consoles_come_from_one_place() -> None:
    """No module makes a console of rich by itself, or writes to a stream past the cleaning."""
    for path in ROOT.rglob("*.py"):
        if path.name == "errors.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert getattr(node.func, "id", "") != "Console", f"{path}:{node.lineno}"
            assert not (isinstance(node, ast.Attribute) and node.attr in ("__stdout__", "__stderr__")), path
