"""Where the user's cache lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgebert_runtime.cache import cache_dir

pytestmark = pytest.mark.usefixtures("linux")


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("EDGEBERT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_it_lies_in_the_users_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "edgebert"


def test_the_environment_names_another_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    assert cache_dir() == tmp_path / "kept" / "edgebert"
    monkeypatch.setenv("EDGEBERT_CACHE_DIR", str(tmp_path / "ours"))
    assert cache_dir() == tmp_path / "ours"


def test_a_tilde_that_nobody_expanded_is_a_directorys_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "~/.cache")  # as a service's environment has it
    assert cache_dir() == Path("~/.cache/edgebert")


def test_without_a_home_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(RuntimeError, match="no home directory"):
        cache_dir()
