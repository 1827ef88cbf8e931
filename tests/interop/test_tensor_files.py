"""Which files a folder's weights are read from: those beside its index, each tensor from one of them."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from easylm_plus.errors import UserError
from easylm_plus.interop.tensor_files import INDEX, indexed, safetensors_of

ONE, TWO = np.arange(4, dtype=np.float32), np.arange(6, dtype=np.float16)


@pytest.fixture
def folder(tmp_path):
    """Two files with an index, beside a file of the same weights in another form."""
    (tmp_path / "model").mkdir()
    save_file({"a": ONE}, tmp_path / "model/1.safetensors")
    save_file({"b": TWO}, tmp_path / "model/2.safetensors")
    save_file({"a": ONE, "b": TWO}, tmp_path / "model/consolidated.safetensors")
    save_file({"b": TWO}, tmp_path / "secret.safetensors")
    index(tmp_path / "model", {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
    return tmp_path / "model"


def index(folder, told):
    (folder / INDEX).write_text(json.dumps(told))


def assert_whole(folder):
    tensors = safetensors_of(folder)
    assert tensors.names() == {"a", "b"}
    np.testing.assert_array_equal(tensors.read("a"), ONE, strict=True)
    np.testing.assert_array_equal(tensors.read("b"), TWO, strict=True)


def test_the_files_of_the_index_are_read(folder):
    assert_whole(folder)


def test_files_that_are_links_are_read(folder, tmp_path):
    """As in Hugging Face's cache."""
    (tmp_path / "blobs").mkdir()
    shutil.move(folder / "1.safetensors", tmp_path / "blobs/f00")
    (folder / "1.safetensors").symlink_to("../blobs/f00")
    assert_whole(folder)


@pytest.mark.parametrize(
    "name",
    ("../secret.safetensors", "{top}/secret.safetensors", "../model/2.safetensors", "./2.safetensors", "..", ".", "",
     "a\\2.safetensors", "2.safetensors\0", 7, None, ["2.safetensors"]),
)  # fmt: skip
def test_a_name_that_leads_elsewhere_is_refused(folder, tmp_path, name):
    name = name.format(top=tmp_path) if isinstance(name, str) else name
    index(folder, {"weight_map": {"a": "1.safetensors", "b": name}})
    with pytest.raises(UserError, match=r"index\.json: found .* in weight_map, expected the name of a file beside it"):
        safetensors_of(folder)


@pytest.mark.parametrize(
    "told", ({}, [], 3, {"weight_map": None}, {"weight_map": ["1.safetensors"]}, {"weight_map": {}})
)
def test_an_index_without_its_map_is_refused(folder, told):
    index(folder, told)
    with pytest.raises(UserError, match=r"index\.json: found no weight_map, expected the file of every tensor"):
        safetensors_of(folder)


@pytest.mark.parametrize("make", (lambda path: None, lambda path: path.mkdir(), lambda path: path.symlink_to("lost")))
def test_a_file_that_is_not_there_is_named(folder, make):
    (folder / "2.safetensors").unlink()
    make(folder / "2.safetensors")
    with pytest.raises(UserError, match=rf"model: 2\.safetensors is not there; {INDEX} names 2 files"):
        indexed(folder / INDEX)


def test_a_tensor_in_two_files_is_named(folder):
    (folder / INDEX).unlink()
    with pytest.raises(UserError, match=r"found a in 1\.safetensors and in consolidated\.safetensors, expected each"):
        safetensors_of(folder)
    (folder / "consolidated.safetensors").unlink()
    assert_whole(folder)
