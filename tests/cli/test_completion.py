"""The program can be called as a module, and completes its verbs in a shell."""

import os
import subprocess
import sys

import pytest

from mmssl.cli import main


def test_the_module_is_the_program() -> None:
    """`python -m mmssl` says what `mmssl` says, and ends with its exit code."""
    done = subprocess.run([sys.executable, "-m", "mmssl", "show", "none.yaml"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no configuration file at none.yaml")


def test_a_script_for_the_shell_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """For bash, zsh and fish the program prints a script that asks it for the words."""
    for shell in ("bash", "zsh", "fish"):
        monkeypatch.setenv("_MMSSL_COMPLETE", f"source_{shell}")
        with pytest.raises(SystemExit) as end:
            main([])
        assert not end.value.code
        assert f"complete_{shell}" in capsys.readouterr().out


@pytest.mark.parametrize(("typed", "expected"), [("mmssl tra", "train"), ("mmssl shards ch", "check")])
def test_bash_completes_verbs(
    typed: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked as bash asks, the program gives the words that fit what was typed."""
    monkeypatch.setenv("_MMSSL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(typed.count(" ")))
    with pytest.raises(SystemExit) as end:
        main([])
    assert not end.value.code
    assert capsys.readouterr().out.split() == [expected]


def test_a_shell_that_is_detected_gets_its_script() -> None:
    """`mmssl --show-completion`, started by bash as a user does, prints bash's script."""
    command = f"{sys.executable} -m mmssl --show-completion; exit $?"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "SHELL": "bash"})
    assert done.returncode == 0, done.stderr
    assert "complete -o default" in done.stdout
