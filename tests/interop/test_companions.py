"""Tokenizers and their like travel with weights; what links lead to elsewhere does not."""

import os
import shutil

import pytest

from easylm_plus.errors import UserError
from easylm_plus.interop.companions import copy_companions


@pytest.fixture
def cache(tmp_path):
    """A folder as Hugging Face's cache keeps it: links to blobs two folders up."""
    (tmp_path / "models--a/blobs").mkdir(parents=True)
    (tmp_path / "models--a/snapshots/f00").mkdir(parents=True)
    for name, blob in (("tokenizer.json", "abc1"), ("vocab.json", "abc2"), ("README.md", "abc3")):
        (tmp_path / "models--a/blobs" / blob).write_text(name)
        (tmp_path / "models--a/snapshots/f00" / name).symlink_to(f"../../blobs/{blob}")
    (tmp_path / "out").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "elsewhere/blobs").mkdir(parents=True)
    shutil.copyfile(tmp_path / "secret.txt", tmp_path / "elsewhere/blobs/secret")
    return tmp_path / "models--a/snapshots/f00"


@pytest.mark.parametrize("through_a_link", (False, True))
def test_links_of_a_cache_are_followed(cache, tmp_path, through_a_link):
    (cache / "tokenizer").mkdir()
    (cache / "merges.txt").write_text("merges.txt")
    (cache / "added_tokens.json").symlink_to("vocab.json")
    (tmp_path / "link").symlink_to(cache)
    found = copy_companions(tmp_path / "link" if through_a_link else cache, tmp_path / "out")
    assert found == ["added_tokens.json", "merges.txt", "tokenizer.json", "vocab.json"]
    for name in found:
        assert not (tmp_path / "out" / name).is_symlink()
        assert (tmp_path / "out" / name).read_text() == ("vocab.json" if name == "added_tokens.json" else name)


@pytest.mark.parametrize("target", ("{top}/secret.txt", "../../../secret.txt", "{top}/elsewhere/blobs/secret", "chain"))
def test_links_elsewhere_are_not(cache, tmp_path, target):
    (cache / "chain").symlink_to("../../../secret.txt")
    (cache / "generation_config.json").symlink_to(target.format(top=tmp_path))
    with pytest.raises(UserError, match=r"generation_config\.json: found a link to .*secret.*, expected a file"):
        copy_companions(cache, tmp_path / "out")
    assert "secret" not in [path.read_text() for path in (tmp_path / "out").iterdir()]


@pytest.mark.parametrize("make", (lambda path: path.symlink_to("lost"), os.mkfifo))
def test_what_is_no_file_is_named(cache, tmp_path, make):
    make(cache / "chat_template.jinja")
    with pytest.raises(UserError, match=r"chat_template\.jinja: found a link to nothing, or no plain file"):
        copy_companions(cache, tmp_path / "out")
