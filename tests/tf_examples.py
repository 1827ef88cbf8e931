"""Files of tf.train.Examples, by protobuf's own classes and ArrayRecord's own writer, for tests of what reads them."""

import functools
import tempfile
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto.tf_example_generated_pb2 import Example

KINDS = {int: "int64_list", float: "float_list", str: "bytes_list", bytes: "bytes_list"}


def example(row):
    """A row of lists, each of one type; an empty list is a feature without a kind."""
    message = Example()
    for name, values in row.items():
        feature = message.features.feature[name]
        for value in values:
            encoded = value.encode() if isinstance(value, str) else value
            getattr(feature, KINDS[type(value)]).value.append(encoded)
    return message.SerializeToString()


def parsed(record):
    """name -> (kind, values), as protobuf reads them."""
    message = Example.FromString(record)
    kinds = {name: feature.WhichOneof("kind") for name, feature in message.features.feature.items()}
    return {
        name: (kind, list(getattr(message.features.feature[name], kind).value) if kind else [])
        for name, kind in kinds.items()
    }


@functools.lru_cache(maxsize=1024)
def array_record(*records, options="group_size:1"):
    """The bytes of a file of these records."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.array_record")
        writer = ArrayRecordWriter(str(path), options)
        for record in records:
            writer.write(record)
        writer.close()
        return path.read_bytes()
