"""PyTorch's own files: tensors are read, anything else is refused and nothing is ever run.

The archives are made here: a zip file, a pickle put together by hand, raw storages. A file that torch made is read in
test_export_peers.py.
"""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
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
    return b"J" + struct.pack("<i", n) if abs(n) < 2**31 else b"\x8a\x09" + n.to_bytes(9, "little", signed=True)


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
    with pytest.raises(
        UserError,
        match=r"found only pytorch_model-00001-of-00002\.bin, which can run code when read; "
        r"expected \*\.safetensors; --allow_pickle of easylm_plus\.convert reads it",
    ):
        run(input=folder, output=tmp_path / "ours")
    run(input=folder, output=tmp_path / "ours", allow_pickle=True)
    found, (_, expected) = read_parameters(*locate(tmp_path / "ours")), load_hf(GOLDEN / "llama_tiny")
    np.testing.assert_array_equal(found["lm_head"]["kernel"], expected["lm_head"]["kernel"])
    q = lambda tree: tree["layers"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(q(found), q(expected))


def test_an_index_is_followed_within_its_folder(folder, tmp_path):
    """Two files and the index of both; then one that leads out, one of a lost file, one without its map."""
    files = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": dict(enumerate(files))}))
    run(input=folder, output=tmp_path / "ours", allow_pickle=True)
    shutil.move(folder / files[1], tmp_path / "secret.bin")
    for told, message in (
        (
            {"weight_map": {"a": files[0], "b": "../secret.bin"}},
            r"found '\.\./secret\.bin' in weight_map, expected the name",
        ),
        ({"weight_map": {"a": files[0], "b": files[1]}}, rf"{files[1]} is not there; {index.name} names 2 files"),
        ({}, "found no weight_map"),
    ):
        index.write_text(json.dumps(told))
        with pytest.raises(UserError, match=message):
            run(input=folder, output=tmp_path / "new", allow_pickle=True)


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
    found = f"the name {os.name}.mkdir" if protocol else "the pickle instruction DICT"
    with pytest.raises(UserError, match=rf"evil\.bin: found {found}, which plain tensors do not need; nothing was run"):
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
        (
            b"\x80\x02" + global_("torch", "FloatStorage") + b"(" + text("/etc/passwd") + b"tR.",
            "a call of torch FloatStorage,",
        ),
        (b"\x80\x02(" + text("builtins") + text("eval") + b"i.", r"damaged pickle \(no newline found"),
        (b"\x80\x02(ibuiltins\neval\n.", "the pickle instruction INST,"),
        (b"\x80\x02(" + text("module") + b"tQ.", "a persistent object that is no storage, but a tuple,"),
        (b"\x80\x02" + text("storage") + b"Q.", "a persistent object that is no storage, but a str,"),
        (b"\x80\x02" + STORAGE.replace(text("0"), text("../0")) + b".", r"a storage in \.\./0,"),
        (b"\x80\x02" + STORAGE.replace(text("0"), b"K\x00") + b".", "a storage in int,"),
        (
            b"\x80\x02"
            + STORAGE.replace(global_("torch", "FloatStorage"), global_("torch._utils", "_rebuild_tensor_v2"))
            + b".",
            "a storage of torch._utils _rebuild_tensor_v2,",
        ),
        (b"\x80\x02(" + text("a") + text("b") + b"tb.", r"damaged pickle \(the stack is empty"),
        (b"\x80\x02" + text("a") + text("b") + b"b.", "attributes set on a str,"),
        (b"\x80\x02" + text("a") + text("b") * 2 + b"s.", "items set on a str,"),
        (b"\x80\x02}" + text("a") + b"\x85" + text("b") + b"s.", "a dict with a tuple as a key,"),
        (b"\x80\x02" + rebuilt(np.dtype(np.float32), "0", 4, 0, (1,), ()) + b".", "a tensor of 1 sizes and 0 strides,"),
        (
            b"\x80\x02" + rebuilt(np.dtype(np.float32), "0", 4, 0, (1,) * 65, (1,) * 65) + b".",
            "a tensor of 65 sizes and 65 strides,",
        ),
        (b"\x80\x04K\x01" + b"\x8c\x06system" + b"\x93.", "a name that is no text,"),
        (b"\x80\x04" + b"\x8c\x02os" + b"\x8c\x06system" + b"\x93.", "the name os.system"),
        (b"\x80\x04" + b"\x8c\xc8" + b"x" * 200 + b"\x8c\x01\n" + b"\x93.", r"the name x{100}\.\.\.,"),
        (b"\x80\x04" + b"\x8c\x03\x1b[m" + b"\x8c\x01y" + b"\x93.", r"the name '\\x1b\[m\.y',"),
        (b"\x80\x02]q\x00.", "the pickle instruction EMPTY_LIST,"),
        (b"\x80\x02K\x01.", "found a int, expected a dict of tensors"),
        (b"\x80\x02}" + text("epoch") + b"K\x01s.", "found int under epoch, expected a tensor under a name"),
        (b"\x80\x02}", r"damaged pickle \(pickle exhausted before seeing STOP"),
        (b"", r"damaged pickle \(pickle exhausted before seeing STOP"),
        (b"\x80\x02h\x07.", r"damaged pickle \(7\)"),
        (b"\xff\xff", r"damaged pickle \(at position 0, opcode b'\\xff' unknown"),
    ),
)
def test_what_is_no_plain_state_dict_is_named(tmp_path, data, message):
    with pytest.raises(UserError, match=rf"x\.bin: (found )?{message}"):
        TorchFiles([archive(tmp_path / "x.bin", data)], "here")


def test_an_ordered_dict_with_attributes_is_plain(tmp_path):
    state = OrderedDict()
    state._metadata = {"version": 1}
    assert TorchFiles([archive(tmp_path / "x.bin", pickle.dumps(state, 2))], "here").names() == set()


NESTED = b"\x80\x02})" + b"\x85" * 3_000_000 + b"K\x01s."  # hashing it takes 3 million frames of C
LAUGHS = b"\x80\x02})q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s."  # (t, t) sixty times: 2^60 leaves


@pytest.mark.parametrize("data", (NESTED, LAUGHS), ids=("nested", "laughs"))
@pytest.mark.parametrize(
    "end", (b"K\x01s.", b"Q.", b")R.", b"b.", b"."), ids=("key", "storage", "call", "state", "result")
)
def test_structures_that_take_more_than_the_program(tmp_path, data, end):
    """In a process of its own: what this refuses has ended the process, or never ended."""
    path = archive(tmp_path / "x.bin", data.removesuffix(b"K\x01s.") + end)
    code = "import pathlib, sys; from easylm_plus.interop.torch_files import TorchFiles\n"
    code += "TorchFiles([pathlib.Path(sys.argv[1])], '')"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, f"ended with {done.returncode}"
    assert done.stderr.splitlines()[-1].endswith(
        "x.bin: found tuples nested in one another, which plain tensors do not need; nothing was run"
    )


def four_floats(path, offset, shape, strides, nbytes=16):
    entries = {"x": rebuilt(np.dtype(np.float32), "0", 4, offset, shape, strides)}
    return archive(path, program(entries), {"0": bytes(nbytes)})


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    ((0, (5,), (1,)), (2, (3,), (1,)), (0, (2, 2), (4, 1)), (4, (), ()), (0, (2,), (2**31 - 1,))),
)
def test_a_view_beyond_its_storage_is_refused(tmp_path, offset, shape, strides):
    with pytest.raises(UserError, match=r"x\.bin: x: found a view of elements \d+ to \d+, of 4"):
        TorchFiles([four_floats(tmp_path / "x.bin", offset, shape, strides)], "here")


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    (
        (0, (5, 2), (-1, 10)),  # ends at element 6, of 20, and starts before the first
        (0, (2, 1001), (1_000_000, -1000)),
        (3, (2,), (-1,)),
        (-1, (1,), (1,)),
        (0, (-1,), (1,)),
        (0, (-2, -2), (1, 1)),
        (2**63, (1,), (1,)),
    ),
)
def test_a_view_that_runs_backwards_is_refused(tmp_path, offset, shape, strides):
    with pytest.raises(
        UserError, match=r"x\.bin: found a tensor with a size, stride or offset that is no integer from 0"
    ):
        TorchFiles([four_floats(tmp_path / "x.bin", offset, shape, strides, nbytes=80)], "here")


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "expected"),
    (
        (3, (1,), (1,), [3]),
        (0, (2, 2), (2, 1), [[0, 1], [2, 3]]),
        (2, (2, 2), (0, 1), [[2, 3], [2, 3]]),
        (3, (1, 1), (2**63 - 1, 7), [[3]]),  # a stride that is never taken
        (9, (0, 3), (5, 5), np.empty((0, 3))),
    ),
)
def test_views_that_just_fit(tmp_path, offset, shape, strides, expected):
    entries = {"x": rebuilt(np.dtype(np.float32), "0", 4, offset, shape, strides)}
    path = archive(tmp_path / "x.bin", program(entries), {"0": np.arange(4, dtype=np.float32).tobytes()})
    np.testing.assert_array_equal(TorchFiles([path], "here").read("x"), np.asarray(expected, np.float32), strict=True)


def test_a_tensor_larger_than_memory_can_be(tmp_path):
    with pytest.raises(
        UserError, match=r"x: found a tensor of shape \[2147483647, 2147483647\], expected one that can"
    ):
        TorchFiles([four_floats(tmp_path / "x.bin", 0, (2**31 - 1,) * 2, (0, 0))], "here")


def test_a_tensor_in_two_files_is_named(tmp_path):
    paths = [save(tmp_path / f"{n}.bin", {"x": np.zeros(3, np.float32)}) for n in (1, 2)]
    with pytest.raises(UserError, match=r"here: found x in 1\.bin and in 2\.bin, expected each tensor in one file"):
        TorchFiles(paths, "here")


# --- archives ---


def compressed(path):
    """A few kilobytes that become a pickle of megabytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02}" + b"N0" * 5_000_000 + b".")
    assert path.stat().st_size < 30_000


def changed(path, *changes):
    """A whole archive of one tensor, with some bytes replaced."""
    save(path, {"x": np.arange(4, dtype=np.float32)})
    data = path.read_bytes()
    for old, new in changes:
        assert old in data and len(old) == len(new)
        data = data.replace(old, new)
    path.write_bytes(data)


def encrypted(path):
    changed(path)
    data = bytearray(path.read_bytes())
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + at] |= 1
    path.write_bytes(data)


def cut(path):
    changed(path)
    data = path.read_bytes()
    path.write_bytes(data[:40] + data[200:])


def larger(path):
    """The directory says that the storage has 2^31 bytes."""
    changed(path)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (compressed, r"found archive/data\.pkl compressed, expected it stored as torch\.save does"),
        (encrypted, r"found archive/data\.pkl encrypted, expected it stored as torch\.save does"),
        (larger, r"damaged archive \(archive/data/0 is said to be larger than the archive\)"),
        (cut, r"damaged archive \("),
        (lambda path: changed(path, (b"\x80\x02}", b"\x80\x03}")),
         r"damaged archive \(Bad CRC-32 for file 'archive/data.pkl'"),
        (lambda path: four_floats(path, 0, (4,), (1,), nbytes=17),
         "x: found 17 bytes in archive/data/0, expected a multiple of 4"),
        (lambda path: archive(path, program({"x": rebuilt(np.dtype(np.float32), "7", 4, 0, (4,), (1,))})),
         "x: found no archive/data/7 in the archive, expected its storage there"),
    ),
)  # fmt: skip
def test_damaged_archives(tmp_path, make, message):
    make(tmp_path / "x.bin")
    with pytest.raises(UserError, match=rf"x\.bin: {message}"):
        TorchFiles([tmp_path / "x.bin"], "here")


def test_a_changed_storage_is_noticed_when_it_is_read(tmp_path):
    changed(tmp_path / "x.bin", (np.arange(4, dtype=np.float32).tobytes(), np.ones(4, np.float32).tobytes()))
    with pytest.raises(UserError, match=r"x\.bin: damaged archive \(Bad CRC-32 for file 'archive/data/0'"):
        TorchFiles([tmp_path / "x.bin"], "here").read("x")


def test_files_of_another_kind(tmp_path):
    (tmp_path / "old.bin").write_bytes(pickle.dumps(119547037146038801333356))
    with pytest.raises(UserError, match=r"old\.bin: found no zip archive, expected what torch\.save has written since"):
        TorchFiles([tmp_path / "old.bin"], "here")
    with pytest.raises(UserError, match="found byte order b'big', expected little"):
        TorchFiles([archive(tmp_path / "big.bin", program({}), byteorder="big")], "here")
