"""PyTorch's own files: tensors are read, anything else is refused and nothing is ever run.

The archives are made here: a zip file, a pickle put together by hand, raw storages. A file that torch made is read in
test_export_peers.py.
"""

import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_convert import GOLDEN, run

from easylm_plus.errors import UserError
from easylm_plus.interop.huggingface import load_hf
from easylm_plus.interop.torch_files import TorchFiles
from easylm_plus.training.checkpoint import locate, read_parameters

TYPES = {np.dtype(np.float32): "FloatStorage", np.dtype(np.float16): "HalfStorage",
         np.dtype(ml_dtypes.bfloat16): "BFloat16Storage"}  # fmt: skip


def text(s):
    return b"X" + struct.pack("<I", len(s)) + s.encode()


def number(n):
    return b"J" + struct.pack("<i", n)


def global_(module, name):
    return b"c" + f"{module}\n{name}\n".encode()


def rebuilt(dtype, key, count, offset, shape, strides):
    """torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, False, OrderedDict())."""
    storage = b"(" + text("storage") + global_("torch", TYPES[dtype]) + text(key) + text("cpu") + number(count) + b"tQ"
    sizes = lambda ns: b"(" + b"".join(map(number, ns)) + b"t"
    arguments = (
        storage + number(offset) + sizes(shape) + sizes(strides) + b"\x89" + global_("collections", "OrderedDict")
    )
    return global_("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b")RtR"


def program(entries):
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u."


def archive(path, data_pkl, storages=(), **more):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data_pkl)
        file.writestr("archive/byteorder", more.get("byteorder", "little"))
        for key, data in dict(storages).items():
            file.writestr(f"archive/data/{key}", data)
    return path


def save(path, arrays):
    entries, storages = {}, {}
    for i, (name, x) in enumerate(arrays.items()):
        strides = [stride // x.itemsize for stride in x.strides]
        entries[name], storages[str(i)] = rebuilt(x.dtype, str(i), x.size, 0, x.shape, strides), x.tobytes()
    return archive(path, program(entries), storages)


@pytest.fixture
def folder(tmp_path):
    """llama_tiny with its weights as two .bin files."""
    place = tmp_path / "llama"
    shutil.copytree(GOLDEN / "llama_tiny", place, ignore=shutil.ignore_patterns("*.npz", "*.safetensors"))
    tensors = load_file(GOLDEN / "llama_tiny/model.safetensors")
    names = sorted(tensors)
    save(place / "pytorch_model-00001-of-00002.bin", {name: tensors[name] for name in names[:9]})
    save(place / "pytorch_model-00002-of-00002.bin", {name: tensors[name] for name in names[9:]})
    (place / "training_args.bin").write_bytes(b"what a Trainer leaves there")
    return place


def test_weights_are_read_when_asked_for(folder, tmp_path):
    with pytest.raises(UserError, match=r"found only pytorch_model-00001-of-00002\.bin, which can run code when read"):
        run(input=folder, output=tmp_path / "ours")
    run(input=folder, output=tmp_path / "ours", allow_pickle=True)
    found, (_, expected) = read_parameters(*locate(tmp_path / "ours")), load_hf(GOLDEN / "llama_tiny")
    np.testing.assert_array_equal(found["lm_head"]["kernel"], expected["lm_head"]["kernel"])
    q = lambda tree: tree["layers"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(q(found), q(expected))


def test_views_and_dtypes(tmp_path):
    flat = np.arange(24).astype(ml_dtypes.bfloat16)
    entries = {
        "turned": rebuilt(flat.dtype, "0", 24, 0, (6, 4), (1, 6)),
        "part": rebuilt(flat.dtype, "0", 24, 7, (2, 3), (12, 2)),
        "one": rebuilt(flat.dtype, "0", 24, 3, (), ()),
    }
    tensors = TorchFiles([archive(tmp_path / "x.bin", program(entries), {"0": flat.tobytes()})], "here")
    np.testing.assert_array_equal(tensors.read("turned"), flat.reshape(4, 6).T)
    np.testing.assert_array_equal(tensors.read("part").astype(int), [[7, 9, 11], [19, 21, 23]])
    assert tensors.read("one") == 3 and tensors.shape("part") == (2, 3) and tensors.dtype("one") == flat.dtype


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, protocol):
    """Python's own machine makes the folder; ours names what it found and makes none."""
    data = pickle.dumps({"weight": Evil(tmp_path / "owned")}, protocol)
    path = archive(tmp_path / "evil.bin", data)
    with pytest.raises(UserError, match=r"evil\.bin: found (the name (posix|nt)\.mkdir|the pickle instruction)"):
        TorchFiles([path], "here")
    assert not (tmp_path / "owned").exists()
    pickle.loads(data)
    assert (tmp_path / "owned").is_dir(), "the pickle was a dangerous one"


STORAGE = b"(" + text("storage") + global_("torch", "FloatStorage") + text("0") + text("cpu") + number(4) + b"tQ"


@pytest.mark.parametrize(
    ("data", "message"),
    (
        (b"\x80\x02" + global_("builtins", "eval") + b"(" + text("1") + b"tR.", "the name builtins.eval"),
        (b"\x80\x02" + global_("torch", "load") + b".", "the name torch.load"),
        (
            b"\x80\x02" + global_("torch._utils", "_rebuild_parameter") + b".",
            "the name torch._utils._rebuild_parameter",
        ),
        (b"\x80\x02" + global_("torch", "FloatStorage") + b"(" + text("/etc/passwd") + b"tR.", "a call of Name"),
        (b"\x80\x02(" + text("builtins") + text("eval") + b"i.", "the pickle instruction INST|damaged pickle"),
        (b"\x80\x02(" + text("module") + b"tQ.", "damaged pickle"),
        (b"\x80\x02" + STORAGE.replace(text("0"), text("../0")) + b".", "the persistent object"),
        (b"\x80\x02(" + text("a") + text("b") + b"tb.", "attributes set on|damaged pickle"),
        (b"\x80\x04" + b"\x8c\x02os" + b"\x8c\x06system" + b"\x93.", "the name os.system"),
        (b"\x80\x02]q\x00.", "the pickle instruction EMPTY_LIST"),
        (b"\x80\x02K\x01.", "found a int, expected a dict of tensors"),
        (b"\x80\x02}" + text("epoch") + b"K\x01s.", "found int under 'epoch', expected a tensor under a name"),
        (b"\x80\x02}", "damaged pickle"),
        (b"", "damaged pickle"),
        (b"\x80\x02h\x07.", "damaged pickle"),
        (b"\xff\xff", "damaged pickle"),
    ),
)
def test_what_is_no_plain_state_dict_is_named(tmp_path, data, message):
    with pytest.raises(UserError, match=rf"x\.bin: .*({message})"):
        TorchFiles([archive(tmp_path / "x.bin", data)], "here")


def test_an_ordered_dict_with_attributes_is_plain(tmp_path):
    state = OrderedDict()
    state._metadata = {"version": 1}
    assert TorchFiles([archive(tmp_path / "x.bin", pickle.dumps(state, 2))], "here").names() == set()


@pytest.mark.parametrize(
    ("offset", "shape", "strides"), ((0, (5,), (1,)), (2, (3,), (1,)), (0, (2, 2), (4, 1)), (3, (2,), (-4,)))
)
def test_a_view_beyond_its_storage_is_refused(tmp_path, offset, shape, strides):
    entries = {"x": rebuilt(np.dtype(np.float32), "0", 4, offset, shape, strides)}
    tensors = TorchFiles(
        [archive(tmp_path / "x.bin", program(entries), {"0": np.zeros(4, np.float32).tobytes()})], "here"
    )
    with pytest.raises(UserError, match="here: x: found a view of elements"):
        tensors.read("x")


def test_files_of_another_kind(tmp_path):
    (tmp_path / "old.bin").write_bytes(pickle.dumps(119547037146038801333356))
    with pytest.raises(UserError, match=r"old\.bin: found no zip archive, expected what torch\.save has written since"):
        TorchFiles([tmp_path / "old.bin"], "here")
    with pytest.raises(UserError, match="found byte order b'big', expected little"):
        TorchFiles([archive(tmp_path / "big.bin", program({}), byteorder="big")], "here")
    entries = {"x": rebuilt(np.dtype(np.float32), "7", 4, 0, (4,), (1,))}
    with pytest.raises(UserError, match="here: x: damaged storage"):
        TorchFiles([archive(tmp_path / "lost.bin", program(entries))], "here").read("x")
