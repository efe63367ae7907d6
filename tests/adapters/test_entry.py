"""`allowed_path`: the gate for folders that users name."""

import os
from pathlib import Path

import pytest

from jlora.adapters.store import allowed_path
from jlora.errors import AdapterError, AdapterNotFound

# ---- paths ----------------------------------------------------------------------------------


def test_a_path_below_a_root_is_allowed_and_made_real(tmp_path: Path) -> None:
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "root")
    want = tmp_path.resolve() / "root" / "a"
    assert allowed_path(tmp_path / "root" / "a", [tmp_path / "root"]) == want
    assert allowed_path(str(tmp_path / "link" / "a"), [tmp_path / "root"]) == want
    assert allowed_path(tmp_path / "root" / "a", ["/nowhere", tmp_path / "link"]) == want


def test_paths_out_of_the_roots_are_refused_before_the_disk_is_asked(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "root-not"
    root.mkdir()
    other.mkdir()
    (root / "link").symlink_to(other)
    for path in (
        other,
        root / "..",
        root / "link",
        "/etc",
        root / ".." / "absent",
        "/",
        "relative",
    ):
        with pytest.raises(AdapterError, match="outside of the folders") as error:
            allowed_path(path, [root])
        assert not isinstance(error.value, AdapterNotFound)


def test_a_missing_folder_below_a_root_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match="No adapter found"):
        allowed_path(tmp_path / "absent", [tmp_path])


def test_a_file_that_links_out_of_the_roots_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "root" / "a"
    folder.mkdir(parents=True)
    (folder / "chat_template.jinja").symlink_to("/etc/passwd")
    with pytest.raises(AdapterError, match=r"chat_template.jinja in .* is a link out"):
        allowed_path(folder, [tmp_path / "root"])


def test_without_roots_run_time_loading_is_off(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="--lora-dir"):
        allowed_path(tmp_path, [])


@pytest.mark.parametrize("path", ["a\0b", "a\nb", "\x1b[31m"])
def test_control_characters_in_a_path_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(AdapterError) as error:
        allowed_path(os.path.join(tmp_path, path), [tmp_path])
    assert str(error.value).isprintable()
