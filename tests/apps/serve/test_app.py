"""Each route gives what the model and the index give when they are called directly."""

import base64
import hashlib
import io
import re
from urllib.parse import urljoin

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from mmssl.apps.explain import explain, image_maps, overlay
from mmssl.apps.search import Hit, Index, exact_nearest
from mmssl.apps.serve import create_app
from mmssl.data.transforms.decoding import decode
from mmssl.errors import UserError
from mmssl.inference import Model
from mmssl.types import Sample
from tests.helpers.export_models import own, some_calibration
from tests.helpers.uploads import image, sent

UPLOAD = image()


def test_words_find_the_nearest_images(client: TestClient, model: Model, index: Index, samples: list[Sample]) -> None:
    """Rows, similarities, keys and captions are those of the index asked with the model's vector of the words."""
    hits = client.get("/api/search", params={"text": "a red square", "k": 5}).json()["hits"]
    rows, similarities = index.nearest(model.encode_text("a red square").numpy(), 5)
    assert [hit["row"] for hit in hits] == rows[0].tolist()
    np.testing.assert_allclose([hit["similarity"] for hit in hits], similarities[0], atol=1e-6)
    assert [(hit["key"], hit["caption"]) for hit in hits] == [
        (samples[row].key, samples[row].fields["txt"]) for row in rows[0]
    ]


def test_a_image_finds_the_nearest_images(
    client: TestClient, model: Model, index: Index, samples: list[Sample]
) -> None:
    """An image of the index is the most similar to itself; `k` bounds the hits, and no more come than there are."""
    for row in (0, 30):
        hits = client.post("/api/search", files=sent(samples[row].image), data={"k": "3"}).json()["hits"]
        rows, similarities = index.nearest(model.encode_image(samples[row].image).numpy(), 3)
        assert [hit["row"] for hit in hits] == rows[0].tolist()
        np.testing.assert_allclose([hit["similarity"] for hit in hits], similarities[0], atol=1e-6)
        assert hits[0]["similarity"] == pytest.approx(1, abs=1e-3)
    assert len(client.post("/api/search", files=sent(UPLOAD), data={"k": "100"}).json()["hits"]) == len(samples)


def test_a_stored_image_finds_the_others(client: TestClient, index: Index) -> None:
    """The neighbours of a row are those of its stored vector, without itself."""
    hits = client.get("/api/images/7/nearest", params={"k": 6}).json()["hits"]
    rows, _ = exact_nearest(index.embedding(7)[None], index.parts, 7, unit=True)
    assert [hit["row"] for hit in hits] == [row for row in rows[0].tolist() if row != 7][:6]


def test_labels_are_the_models(client: TestClient, model: Model) -> None:
    """Probabilities are those of `classify`, with a prompt template too; the likeliest label is first."""
    labels = ["red", "green square", "été", "white"]
    for form, template in (({}, "{c}"), ({"template": "a photo of {c}"}, "a photo of {c}")):
        answer = client.post("/api/labels", files=sent(UPLOAD), data={"labels": labels, **form}).json()["labels"]
        expected = model.classify(UPLOAD, labels, template)
        assert [guess["label"] for guess in answer] == list(expected)
        np.testing.assert_allclose([guess["probability"] for guess in answer], list(expected.values()), atol=1e-6)


@pytest.mark.parametrize("method", ["rise", "occlusion"])
def test_the_map_is_the_explanations(client: TestClient, model: Model, method: str) -> None:
    """Similarity, words and overlay are those of `explain`, the grid that of `image_maps`."""
    assert method in client.get("/api/model").json()["methods"]
    answer = client.post("/api/map", files=sent(UPLOAD), data={"text": "a red square", "method": method}).json()
    expected = explain(model, UPLOAD, "a red square", method)
    assert answer["similarity"] == pytest.approx(expected.similarity, abs=1e-6)
    assert [score["word"] for score in answer["words"]] == ["a", "red", "square"]
    np.testing.assert_allclose([score["fall"] for score in answer["words"]], [s for _, s in expected.words], atol=1e-6)
    png = base64.b64decode(answer["overlay"].removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(decode(png), overlay(expected.image, expected.heat).permute(1, 2, 0).numpy())
    words = model.encode_text("a red square")
    maps = image_maps(model.encoder, model.render(UPLOAD)[None], words, method)
    torch.testing.assert_close(torch.tensor(answer["grid"]), maps[0], atol=1e-6, rtol=0)


def test_images_are_shown_by_row(client: TestClient, samples: list[Sample]) -> None:
    """The image of a row is that of its shard, as JPEG; a large one is made small."""
    for row in (0, 25, 47):
        answer = client.get(f"/api/images/{row}")
        assert answer.headers["content-type"] == "image/jpeg"
        shown, stored = decode(answer.content).astype(int), decode(samples[row].image).astype(int)
        assert shown.shape == stored.shape
        assert abs(shown.mean((0, 1)) - stored.mean((0, 1))).max() < 4
    assert client.get("/api/images/48").status_code == 404


def test_what_is_served_is_told(client: TestClient, model: Model) -> None:
    """Sizes and limits; and the description of the API names every route, with its limits."""
    facts = client.get("/api/model").json()
    assert (facts["images"], facts["dimensions"], facts["image_size"]) == (48, 16, 32)
    assert client.get("/api/health").json() == {"status": "ok"}
    paths = client.get("/api/openapi.json").json()["paths"]
    assert {(path, method) for path, methods in paths.items() for method in methods} == {
        ("/api/health", "get"),
        ("/api/model", "get"),
        ("/api/search", "get"),
        ("/api/search", "post"),
        ("/api/labels", "post"),
        ("/api/map", "post"),
        ("/api/images/{row}", "get"),
        ("/api/images/{row}/nearest", "get"),
    }
    assert paths["/api/search"]["get"]["parameters"][1]["schema"]["maximum"] == facts["limits"]["hits"]


def test_the_page_is_whole_and_its_policy_lets_only_its_own_script_run(client: TestClient) -> None:
    """The policy names the digests of the one script and the one style there are; nothing points to another site."""
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    for tag in ("script", "style"):
        (inline,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
        assert len(inline) > 1000
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert all(url.startswith(("#", "data:")) for url in re.findall(r'(?:src|href)="([^"]*)"', answer.text))
    assert "//" not in re.sub(r"(?m)(^| )// .*$", "", answer.text)


@pytest.mark.parametrize("proxied", [False, True], ids=["mounted", "behind a proxy"])
def test_the_page_works_under_a_prefix(model: Model, index: Index, proxied: bool) -> None:
    """Mounted in another application, or behind a proxy that cuts the prefix off: each address that the script of the
    page asks is answered, when a browser resolves it against the page's own address."""
    app = create_app(model, index)
    outer = Starlette(routes=[Mount("/find/images", app=_Proxy(app) if proxied else app)])
    client = TestClient(outer, base_url="http://localhost")
    page = client.get("/find/images/")
    addresses = set(re.findall(r"""["`](/?api/[a-z/]*)""", page.text))
    assert addresses == {"api/model", "api/search", "api/labels", "api/map", "api/images/"}
    for address in addresses:
        url = urljoin(str(page.url), f"{address}0" if address.endswith("/") else address)
        assert client.get(url).status_code in (200, 405, 422), url
    assert client.get("/api/model").status_code == 404


class _Proxy:
    """Passes requests on without the prefix, and without telling of it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope["root_path"])
        await self.app({**scope, "path": path, "raw_path": path.encode(), "root_path": ""}, receive, send)


def test_without_an_index_there_is_no_search(model: Model) -> None:
    """Labels and maps are there; what needs an index says how to have one."""
    client = TestClient(create_app(model), base_url="http://localhost")
    assert client.get("/api/model").json()["images"] is None
    assert client.post("/api/labels", files=sent(UPLOAD), data={"labels": ["red"]}).status_code == 200
    answers = [
        client.get("/api/search", params={"text": "red"}),
        client.post("/api/search", files=sent(UPLOAD)),
        client.get("/api/images/0"),
        client.get("/api/images/0/nearest"),
    ]
    for answer in answers:
        assert answer.status_code == 404
        assert "mmssl serve MODEL INDEX" in answer.json()["detail"]


def test_images_whose_shard_is_gone_or_changed_are_not_shown(
    model: Model, samples: list[Sample], index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file in the shard's place, or none, gives 404 without its path; found images keep their captions."""
    client = TestClient(create_app(model, index), base_url="http://localhost")
    for shard in ("/etc/passwd", "/nowhere/0.tar", "https://example.org/0.tar", "pipe:cat /etc/passwd"):
        monkeypatch.setattr(index, "shards", [shard, shard])
        answer = client.get("/api/images/3")
        assert answer.status_code == 404
        assert shard not in answer.text
        hits = client.get("/api/search", params={"text": "red", "k": 1}).json()["hits"]
        assert hits[0]["caption"] == samples[hits[0]["row"]].fields["txt"]


def test_conditions_leave_only_images_that_meet_them(client: TestClient, model: Model, index: Index) -> None:
    """On all three routes the hits are those of the index asked with the same conditions, with their fields and the
    file name of their shard; a wrong condition is refused without the path of the index."""
    where = ["cls=1", "caption~square"]
    text = client.get("/api/search", params={"text": "green", "k": 9, "where": where}).json()["hits"]
    upload = client.post("/api/search", files=sent(UPLOAD), data={"k": "9", "where": where}).json()["hits"]
    near = client.get("/api/images/7/nearest", params={"k": 9, "where": where}).json()["hits"]
    queries = (model.encode_text("green"), model.encode_image(UPLOAD), torch.tensor(index.embedding(7))[None])
    for hits, query in zip((text, upload, near), queries, strict=True):
        rows, _ = index.nearest(query.numpy(), 10, where=where)
        assert [hit["row"] for hit in hits] == [row for row in rows[0].tolist() if hits is not near or row != 7][:9]
        assert {hit["fields"]["cls"] for hit in hits} == {"1"}
        assert {hit["shard"] for hit in hits} <= {"0.tar", "1.tar"}
    assert client.get("/api/model").json()["fields"] == ["cls"]
    assert client.get("/api/search", params={"text": "a", "where": "cls=99"}).json()["hits"] == []
    for wrong in ("cls", "colour=red"):
        answer = client.get("/api/search", params={"text": "a", "where": wrong})
        assert answer.status_code == 422
        assert "where" in answer.json()["detail"]
        assert str(index.folder) not in answer.text


def test_many_fields_are_cut(model: Model, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fields that are long together, the first are in the answer."""
    fields: dict[str, str | list[str]] = {f"f{n}": ["x" * 200] * 10 for n in range(9)}
    client = TestClient(create_app(model, index), base_url="http://localhost")
    monkeypatch.setattr(index, "hits", lambda rows, _: [Hit(0.5, "shard", "k", "", fields) for _ in rows])
    (hit,) = client.get("/api/search", params={"text": "a", "k": 1}).json()["hits"]
    assert list(hit["fields"]) == ["f0"]


def test_an_index_of_the_first_dimensions_is_served_with_them(model: Model, index: Index) -> None:
    """Hits are those of an index searched with 8 dimensions."""
    short = Index(index.folder, 8)
    client = TestClient(create_app(model, short), base_url="http://localhost")
    assert client.get("/api/model").json()["dimensions"] == 8
    hits = client.get("/api/search", params={"text": "green", "k": 5}).json()["hits"]
    query = model.first_dimensions(8).encode_text("green").numpy()
    assert [hit["row"] for hit in hits] == short.nearest(query, 5)[0][0].tolist()


def test_long_captions_are_cut(model: Model, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caption as long as a book becomes 1,000 characters in an answer, and so does a key."""
    client = TestClient(create_app(model, index), base_url="http://localhost")
    monkeypatch.setattr(index, "hits", lambda rows, _: [Hit(0.5, "shard", "k" * 50_000, "ab" * 100_000) for _ in rows])
    (hit,) = client.get("/api/search", params={"text": "a", "k": 1}).json()["hits"]
    assert hit["caption"] == "ab" * 499 + "a…"
    assert hit["key"] == "k" * 999 + "…"


def test_an_index_of_another_model_is_refused(index: Index) -> None:
    """Before anything is served."""
    other = own("cls")
    with torch.no_grad():
        for weight in other.encoder.image_projection.parameters():
            weight.neg_()
    with pytest.raises(UserError, match="another model"):
        create_app(other, index)


def test_formats_are_told_apart_by_their_bytes(client: TestClient) -> None:
    """JPEG, WebP, GIF, BMP and TIFF are taken, whatever the name and type say."""
    for kind in ("JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        file = io.BytesIO()
        Image.new("RGB", (12, 9), "green").save(file, kind)
        answer = client.post("/api/search", files={"image": ("x.html", file.getvalue(), "text/html")})
        assert answer.status_code == 200, kind


def test_a_calibrated_model_says_so(model: Model, index: Index) -> None:
    """With a calibration, labels have the probabilities, matches and likely ones of `classify`, with that of none of
    them; hits of a text have the sigmoid of their similarity, hits of an image none. Without, these are null."""
    calibrated = Model(model.encoder, model.tokenizer, model.config)
    calibrated.calibration = some_calibration()
    labels = ["red", "green square", "white"]
    expected = calibrated.classify(UPLOAD, labels)
    assert expected.verdict is not None
    for served, known in ((calibrated, True), (model, False)):
        with TestClient(create_app(served, index), base_url="http://localhost") as client:
            assert client.get("/api/model").json()["calibrated"] is known
            answer = client.post("/api/labels", files=sent(UPLOAD), data={"labels": labels}).json()
            by_text = client.get("/api/search", params={"text": "a red square", "k": 5}).json()["hits"]
            by_image = client.post("/api/search", files=sent(UPLOAD), data={"k": "3"}).json()["hits"]
        assert {hit["match"] for hit in by_image} == {None}
        if not known:
            assert {answer["none"], answer["coverage"], *(hit["match"] for hit in by_text)} == {None}
            continue
        assert [guess["label"] for guess in answer["labels"]] == list(expected)
        for guess in answer["labels"]:
            assert guess["probability"] == pytest.approx(expected[guess["label"]], abs=1e-6)
            assert guess["match"] == pytest.approx(expected.verdict.matches[guess["label"]], abs=1e-6)
            assert guess["likely"] is (guess["label"] in expected.verdict.likely)
        assert (answer["none"], answer["coverage"]) == (pytest.approx(expected.verdict.none, abs=1e-6), 0.9)
        for hit in by_text:
            assert hit["match"] == pytest.approx(1 / (1 + np.exp(3 - 30 * hit["similarity"])), abs=1e-6)
