"""Names of plug-ins: our own modules, and dotted paths to a user's."""

from pathlib import Path

import pytest

from mmssl.errors import UserError
from mmssl.plugins import load_plugin


class Base:
    """What plug-ins derive from."""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The current folder holds a module of a user with two plug-ins, and one with a single one."""
    monkeypatch.chdir(tmp_path)
    head = "from tests.test_plugins import Base\n"
    (tmp_path / "plugin_two.py").write_text(head + "class A(Base): ...\nclass B(Base): ...\nC = 1\n")
    (tmp_path / "plugin_lab").mkdir()
    (tmp_path / "plugin_lab" / "one.py").write_text(head + "class Only(Base): ...\n")
    return "plugin_two"


def test_a_path_names_a_class_or_a_module_with_one(package: str) -> None:
    """Modules of the current folder are found, although it is not in `sys.path`."""
    import json as nothing

    assert load_plugin("plugin_two:B", nothing, Base, "thing").__name__ == "B"
    assert load_plugin("plugin_lab.one", nothing, Base, "thing").__name__ == "Only"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other", "unknown thing 'other'; choose from decoder, encoder"),
        ("nowhere.at_all", "there is no module 'nowhere'"),
        ("plugin_two:C", "plugin_two has no class 'C' derived from Base"),
        ("plugin_two:D", "plugin_two has no class 'D' derived from Base"),
        ("plugin_two.", "there is no module 'plugin_two.'"),
    ],
)
def test_wrong_names_are_explained_in_one_line(package: str, name: str, message: str) -> None:
    """The message says what is wrong and what there is."""
    import json

    with pytest.raises(UserError, match=message) as error:
        load_plugin(name, json, Base, "thing")
    assert "\n" not in str(error.value)


def test_two_classes_need_a_choice(package: str, tmp_path: Path) -> None:
    """A module with several plug-ins does not say which is meant."""
    import json

    (tmp_path / "plugin_pair").mkdir()
    (tmp_path / "plugin_pair" / "two.py").write_text(
        "from plugin_two import Base\nclass A(Base): ...\nclass B(Base): ...\n"
    )
    with pytest.raises(UserError, match="defines 2 classes derived from Base; name one, as plugin_pair.two:MyClass"):
        load_plugin("plugin_pair.two", json, Base, "thing")
