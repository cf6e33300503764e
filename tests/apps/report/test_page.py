"""The page as text: it holds what runs left, nothing in it can run or ask the network, and half a run is enough."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from mmssl.apps.report import write_report
from mmssl.apps.report.page import confusion_table, hardest
from mmssl.apps.report.run_reader import collect
from mmssl.apps.report.wording import LONGEST, in_words, list_metrics
from mmssl.cli import main
from mmssl.errors import UserError
from tests.apps.report.conftest import HOSTILE
from tests.helpers.toy_encoder import pack, paint

VOID = {"meta", "link", "img", "input", "br"}


class Reader(HTMLParser):
    """Tags with their attributes, text, and whether everything that is opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(hostile_run: Path, second_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path, notes = write_report([hostile_run, second_run], tmp_path_factory.mktemp("report"))
    assert notes == []
    return path.read_text(encoding="utf-8")


def test_names_from_data_are_text_only(page: str) -> None:
    """Hostile class names appear as they are, as text: the page has its own two scripts and no handler of events."""
    found = Reader(page)
    assert found.open == []
    scripts = [attributes for tag, attributes in found.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "page-data"}, {}]
    assert [name for _, attributes in found.tags for name in attributes if name.startswith("on")] == []
    assert not any(tag == "b" for tag, _ in found.tags)
    for name in HOSTILE:
        assert name in found.text


def test_nothing_is_asked_of_a_network(page: str) -> None:
    """Every source is a data URI or a place in the page, and the page's policy forbids everything else."""
    found = Reader(page)
    sources = [a[k] for _, a in found.tags for k in ("src", "href") if k in a]
    assert [s for s in sources if s is None or not s.startswith(("data:", "#"))] == []
    policy = next(a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert len(page.encode()) < 10_000_000


def test_the_page_can_be_listened_to(page: str) -> None:
    """One title, headings without a step left out, a name for every image and table, and unique ids."""
    found = Reader(page)
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(a.get("alt") for tag, a in found.tags if tag == "img")
    assert all(a.get("aria-label") for _, a in found.tags if a.get("role") in ("img", "region", "application"))
    tables, captions = (sum(tag == name for tag, _ in found.tags) for name in ("table", "caption"))
    assert tables == captions > 0
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(a["href"][1:] in ids for tag, a in found.tags if tag == "a" and a["href"])


def test_figures_and_curves_are_those_of_the_run(page: str, hostile_run: Path) -> None:
    """Accuracies with their intervals stand in the text, and the curve of the loss is that of metrics.jsonl."""
    results = json.loads((hostile_run / "results.json").read_text())
    found = Reader(page)
    for key in ("colors/zero_shot", "found/retrieval"):
        for figure in list_metrics(results[key]):
            assert figure.words in found.text
            assert figure.text in found.text
            assert figure.interval_text in found.text
    data = json.loads(page.split('id="page-data">')[1].split("</script>")[0])
    chart = next(c for c in data["charts"] if c["key"] == "contrastive.loss")
    records = [json.loads(line) for line in (hostile_run / "metrics.jsonl").read_text().splitlines()]
    assert chart["series"][0]["x"] == [r["step"] for r in records]
    assert chart["series"][0]["y"] == pytest.approx([r["contrastive.loss"] for r in records], rel=1e-4)
    assert any(c["key"] == "colors/zero_shot/acc1" for c in data["charts"])


def test_runs_are_compared(page: str) -> None:
    """Side by side stand the figures of both runs, their paired differences and the setting that differs."""
    text = Reader(page).text
    assert "Differences to hostile, on the same samples" in text
    assert "optim.lr" in text
    assert "not significant" in text


def test_what_is_needed_to_repeat_a_run_is_told(page: str, hostile_run: Path) -> None:
    """Command, versions, commit, fingerprint and the digest of the weights."""
    text = Reader(page).text
    start = json.loads((hostile_run / "environment.json").read_text())["starts"][0]
    for word in (start["command"], start["data_fingerprint"], start["versions"]["torch"], "SHA-256"):
        assert word in text


def test_a_run_that_still_goes_on_has_a_page(hostile_run: Path, tmp_path: Path) -> None:
    """Without model and figures, and with the last line of its log cut off, a run still has its curves."""
    run = tmp_path / "running"
    run.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(hostile_run / name, run)
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole[:-40])
    path, notes = write_report([run], tmp_path / "report")
    text = Reader(path.read_text(encoding="utf-8")).text
    assert notes == []
    assert "still running" in text
    assert "29 steps" in text
    assert "No metrics yet" in text


def test_a_run_that_has_not_begun_has_a_page(hostile_run: Path, tmp_path: Path) -> None:
    """A folder with a configuration and nothing else is a run."""
    run = tmp_path / "new"
    run.mkdir()
    shutil.copy(hostile_run / "config.yaml", run)
    path, _ = write_report([run], tmp_path / "report")
    assert "has written no step yet" in path.read_text(encoding="utf-8")


def test_groups_have_a_table(hostile_run: Path, tmp_path: Path) -> None:
    """Accuracies by group, as `mmssl eval --slice-by` writes them, stand on the page with their intervals."""
    run = tmp_path / "sliced"
    shutil.copytree(hostile_run, run)
    table = run / "colors" / "zero_shot" / "slices.csv"
    table.write_text("field,group,samples,accuracy,low,high\nstyle,<i>noto</i>,40,0.25,0.125,0.5\n")
    path, _ = write_report([run], tmp_path / "report", images=0)
    text = Reader(path.read_text(encoding="utf-8")).text
    for words in ("<i>noto</i>", "25.0 %", "12.5 % to 50.0 %"):
        assert words in text


def test_what_cannot_be_concluded_is_told(hostile_run: Path, tmp_path: Path) -> None:
    """The note of an audit of associations stands below its gaps, and its sum is how many gaps are no chance."""
    run = tmp_path / "audited"
    shutil.copytree(hostile_run, run)
    gap = {"best": "a", "worst": "b", "width": 0.5, "p_value": 0.001}
    figures = {"classes": 9, "samples": 40, "real_gaps": 2, "gaps": {"who: doctor": gap}, "note": "nothing follows"}
    (run / "results.json").write_text(json.dumps({"jobs/associations": figures}))
    path, _ = write_report([run], tmp_path / "report", images=0)
    text = Reader(path.read_text(encoding="utf-8")).text
    assert "What cannot be concluded: nothing follows." in text
    assert "jobs: associations with groups: significant gaps between groups 2." in text


def test_captions_as_long_as_books_do_not_fill_the_page(hostile_run: Path, tmp_path: Path) -> None:
    """They are shown by their beginning, in tables, searches and on the map; what is the same is found by the whole."""
    run = tmp_path / "long"
    shutil.copytree(hostile_run, run)
    start = "long " * 40_000
    records = [{"png": paint(9 * i, i), "txt": f"{start} {i % 6}", "json": {"label": "x"}} for i in range(12)]
    shard = pack(tmp_path / "books-0.tar", records)
    captions = [f"{start} {i % 6}" for i in range(12)]
    lines = "".join(f"{shard},{i:05d},image,{captions[i]},1,1\n" for i in range(12))
    (run / "found" / "retrieval" / "ranks.csv").write_text(f"shard,key,retrieval,caption,rank,place\n{lines}")
    examples = json.loads((run / "found" / "retrieval" / "examples.json").read_text())
    examples["by_caption"][0]["caption"] = start
    (run / "found" / "retrieval" / "examples.json").write_text(json.dumps(examples))
    (run / "colors" / "zero_shot" / "per_class.csv").write_text(f"class,samples,recall,precision\n{start},9,0.5,\n")
    path, _ = write_report([run], tmp_path / "report")
    page = path.read_text(encoding="utf-8")
    assert "long long" in page
    assert len(page) < 2_000_000
    points = json.loads(page.split('id="page-data">')[1].split("</script>")[0])["spaces"]
    (books,) = (found for found in points.values() if len(found) == 12)
    assert {len(point["label"]) for point in books} == {LONGEST}


def test_images_that_are_gone_are_told(hostile_run: Path, tmp_path: Path) -> None:
    """Where the shards have been moved, the page has its figures and examples and says why there are no maps."""
    run = tmp_path / "moved"
    shutil.copytree(hostile_run, run)
    for table in run.glob("*/*/*.csv"):
        table.write_text(table.read_text().replace("/hostile", "/elsewhere"))
    path, _ = write_report([run], tmp_path / "report")
    text = Reader(path.read_text(encoding="utf-8")).text
    assert "Maps cannot be drawn" in text
    assert "Accuracy" in text


def test_examples_and_searches_are_those_of_the_evaluation(hostile_run: Path, tmp_path: Path) -> None:
    """The page holds each thumbnail as the evaluation wrote it, and needs the model for maps only."""
    path, _ = write_report([hostile_run], tmp_path / "report", images=0)
    page = path.read_text(encoding="utf-8")
    thumbnails = [*hostile_run.glob("found/retrieval/thumbnails/*.webp")]
    assert len(thumbnails) >= 6
    for file in thumbnails:
        assert base64.b64encode(file.read_bytes()).decode() in page
    for words in ("Text to image", "Image to text", "Calibration", "Drawn at random."):
        assert words in page
    assert "Orange marks the places" not in page


def test_a_run_without_examples_has_a_page(hostile_run: Path, tmp_path: Path) -> None:
    """Runs of older versions have no examples.json: the page has its map and a note; a damaged file is a note too."""
    run = tmp_path / "old"
    shutil.copytree(hostile_run, run)
    (run / "colors" / "zero_shot" / "examples.json").unlink()
    (run / "found" / "retrieval" / "examples.json").write_text('{"kind": "retrieval"}')
    path, _ = write_report([run], tmp_path / "report")
    text = Reader(path.read_text(encoding="utf-8")).text
    for words in ("No examples.json", "examples.json cannot be shown", "Map of the images"):
        assert words in text
    data = json.loads(path.read_text(encoding="utf-8").split('id="page-data">')[1].split("</script>")[0])
    assert [len(points) for points in data["spaces"].values()] == [48, 48]
    assert "Text to image" not in text
    assert "Drawn at random" not in text


def test_damaged_lines_are_counted(hostile_run: Path, tmp_path: Path) -> None:
    """A line in the middle that is no JSON is told, not passed over in silence."""
    run = tmp_path / "damaged"
    run.mkdir()
    lines = (hostile_run / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:20]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = collect([run])[0]
    assert len(found.metrics) == 29
    assert "1 lines cannot be read" in found.notes[0]


def test_no_run_no_page(tmp_path: Path) -> None:
    """A folder that is not a run is refused, and nothing is written."""
    with pytest.raises(UserError, match="is not a run"):
        write_report([tmp_path], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_the_command_says_what_it_wrote(hostile_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`mmssl report RUN --out FOLDER` prints the file."""
    with pytest.raises(SystemExit) as ended:
        main(["report", str(hostile_run), "--out", str(tmp_path / "r"), "--images", "0"])
    assert not ended.value.code
    assert "index.html" in capsys.readouterr().out
    assert "Images were not encoded" in (tmp_path / "r" / "index.html").read_text(encoding="utf-8")


def test_the_card_has_the_same_facts(hostile_run: Path) -> None:
    """The model card beside the weights: figures with intervals, what it was trained on, limits, and how to use it."""
    card = (hostile_run / "model" / "README.md").read_text(encoding="utf-8")
    results = json.loads((hostile_run / "results.json").read_text())
    for figures in results.values():
        for figure in list_metrics(figures):
            assert f"| {figure.words} | {figure.text} | {figure.interval_text} |" in card
    for word in ("mmssl.load", "## Limits", "timm:vit_tiny_patch16_224", "SHA-256"):
        assert word in card
    assert "\n\n\n" not in card


def test_a_later_evaluation_goes_into_the_card(
    hostile_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mmssl eval RUN DATA --out RUN/NAME` adds its figures; a card that somebody changed is left, which is told; an
    evaluation kept elsewhere changes nothing."""
    run = tmp_path / "hostile"
    shutil.copytree(hostile_run, run)
    config = collect([run])[0].config
    assert config is not None
    data, card = config.evaluate.suites["colors"].data, run / "model" / "README.md"

    def judged(out: Path) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["eval", str(run), data, "--task", "retrieval", "--no-cache", "--out", str(out)])
        assert not ended.value.code
        return capsys.readouterr().out.replace("\n", "")

    before = card.read_text(encoding="utf-8")
    judged(tmp_path / "elsewhere")
    assert card.read_text(encoding="utf-8") == before
    assert "README.md has these metrics too" in judged(run / "later")
    after = card.read_text(encoding="utf-8")
    ((key, figures),) = json.loads((run / "later" / "results.json").read_text()).items()
    rows = [f"| {f.words} | {f.text} | {f.interval_text} |" for f in list_metrics(figures)]
    assert all(row in after.split(f"{key.partition('/')[0]}: ")[-1] for row in rows)
    assert all(line in after for line in before.splitlines() if not line.startswith("hostile: "))
    card.write_text(f"{after}\nOur own words.\n", encoding="utf-8")
    assert "was edited and is left as it is" in judged(run / "third")
    assert card.read_text(encoding="utf-8").endswith("Our own words.\n")


def test_numbers_are_shown_with_their_unit() -> None:
    """Rates in percent, counts whole, others with four digits; inner figures keep the name of the outer."""
    assert [in_words(0.2575, True), in_words(460, False), in_words(3.14159, False)] == ["25.8 %", "460", "3.142"]
    tree = {"acc1": 0.5, "noise": {"severity 1": 0.25}, "gaps": {"x": {"width": 1}}, "intervals": {"acc1": [0.4, 0.6]}}
    found = {f.name: f.interval_text for f in list_metrics(tree)}
    assert found == {"acc1": "40.0 % to 60.0 %", "noise / severity 1": ""}


def test_the_matrix_counts_predictions() -> None:
    """Rows are labels, columns predictions; too many classes make no matrix."""
    rows = [{"label": a, "class1": b} for a, b in ("xx", "xy", "yy", "yy")]
    assert confusion_table(rows) == (["x", "y"], [[1, 1], [0, 2]])
    assert confusion_table([{"label": str(i), "class1": str(i)} for i in range(31)]) is None
    assert confusion_table([]) is None


def test_the_hardest_classes_have_enough_samples() -> None:
    """Classes of an image or two tell nothing and are left out; the lowest recall comes first."""
    rows = [
        {"class": "a", "samples": "1", "recall": "0.0", "precision": ""},
        {"class": "b", "samples": "9", "recall": "0.5", "precision": "1"},
        {"class": "c", "samples": "9", "recall": "0.25", "precision": "1"},
    ]
    assert [row["class"] for row in hardest(rows)] == ["c", "b"]
