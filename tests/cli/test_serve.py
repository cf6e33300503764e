"""`mmssl serve` starts the server it was asked for."""

import sys
from pathlib import Path

import pytest
import uvicorn

from mmssl.cli import main
from tests.helpers.export_models import own


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("m")
    own().save(folder)
    return folder


def serve(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What is printed."""
    with pytest.raises(SystemExit):
        main(["serve", *arguments])
    got = capsys.readouterr()
    return got.out, got.err


def test_it_listens_on_loopback_and_warns_elsewhere(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default only this machine reaches it; another address is used with a warning."""
    served = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: served.append(sockets[0].getsockname()[0]))
    out, _ = serve([str(saved), "--port", "0"], capsys)
    assert "http://127.0.0.1:" in out
    assert "warning" not in out
    out, _ = serve([str(saved), "--port", "0", "--host", "0.0.0.0"], capsys)
    assert "can be reached from other machines, and there is no login" in out
    assert served == ["127.0.0.1", "0.0.0.0"]


def test_what_is_missing_is_said(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No index in the folder, no such host, no FastAPI: one line each, with what to do."""
    assert "mmssl embed MODEL SHARDS" in serve([str(saved), str(tmp_path)], capsys)[1]
    assert "cannot listen on nowhere.invalid" in serve([str(saved), "--host", "nowhere.invalid"], capsys)[1]
    for name in [name for name in sys.modules if name.startswith("mmssl.apps.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "pip install 'mmssl[serve]'" in serve([str(saved)], capsys)[1]
