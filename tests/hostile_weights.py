"""Weights and model folders that would run something, read what is not theirs, or fill the memory, if trusted."""

import json
import pickle
import shutil
import struct
import zipfile

import numpy as np
import torch

CODE = "open({!r}, 'w').close()"  # what every one of them would do


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(trace):
    """Pickles by the way in which they would make the file `trace`."""
    code, command = CODE.format(str(trace)).encode(), f"touch {trace}".encode()
    short, words = (struct.pack("<I", len(text)) + text for text in (code, command))
    return {
        "reduce, protocol 0": b"cposix\nsystem\n(V" + command + b"\ntR.",
        "reduce, protocol 2": pickle.dumps(Call(exec, code.decode()), protocol=2),
        "stack global": b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93X" + short + b"\x85R.",
        "inst": b"(V" + command + b"\niposix\nsystem\n.",
        "obj": b"(cposix\nsystem\nX" + words + b"o.",
        "new object": b"\x80\x02csubprocess\nPopen\n(X" + words + b"t\x81.",
        "new object with words": b"\x80\x04csubprocess\nPopen\n]X" + words + b"a\x85}\x92.",
        "build": b"\x80\x02cbuiltins\nexec\nX" + short + b"\x85R}b.",
        "in an ordered dictionary": pickle.dumps({"state_dict": {}, "callbacks": [Call(exec, code.decode())]}),
        "persistent id": b"\x80\x02X" + short + b"Q.",
        "extension code": b"\x80\x02\x82\x01X" + short + b"\x85R.",
        "getattr": b"\x80\x04cbuiltins\ngetattr\ncos\nX\x06\x00\x00\x00system\x86RX" + words + b"\x85R.",
        "import": b"\x80\x04cbuiltins\n__import__\nX\x04\x00\x00\x00evil\x85R.",
        "torch's own storage": b"\x80\x02ctorch.storage\n_load_from_bytes\nB" + short + b"\x85R.",
    }


def zipped(file, trace):
    """What torch.save makes of something hostile."""
    torch.save({"state_dict": {}, "more": Call(exec, CODE.format(str(trace)))}, file)
    return file


def legacy(file, trace):
    """The same in torch's older format."""
    torch.save(Call(exec, CODE.format(str(trace))), file, _use_new_zipfile_serialization=False)
    return file


def torchscript(file, trace):
    """A TorchScript archive, which holds code."""
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(file))
    return file


def swollen(file, trace):
    """A kilobyte that becomes a tensor of terabytes."""
    torch.save({"encoder.conv_in.weight": torch.zeros(1).expand(2**20, 2**20)}, file)
    return file


def object_array(file, trace):
    """A NumPy archive with a pickled object in it, under a checkpoint's name."""
    with open(file, "wb") as stream:
        np.savez(stream, weights=np.array([Call(exec, CODE.format(str(trace)))], dtype=object))
    return file


def climbing(file, trace):
    """A zip whose members climb out of it."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../../evil.py", CODE.format(str(trace)))
        archive.writestr("archive/data.pkl", payloads(trace)["stack global"])
    return file


ARCHIVES = {
    "torch.save": zipped,
    "torch.save, old format": legacy,
    "swollen tensor": swollen,
    "torchscript": torchscript,
    "object array": object_array,
    "members that climb": climbing,
}


def header(text, length=None):
    """A safetensors file with this header, which may lie about its length."""
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


HEADERS = {
    "a header of exabytes": header(b"{}", 2**63),
    "a header beyond the file": header(b"{}", 10_000_000),
    "no JSON": header(b"{" * 64),
    "a deep header": header(b"[" * 100_000 + b"]" * 100_000),
    "offsets that overlap": header({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"})
    + bytes(8),
    "offsets beyond the file": header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
    "an unknown type": header({"a": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]}}) + bytes(8),
    "a pickle": pickle.dumps(Call(exec, "1")),
}


def copied(model, folder):
    """A model folder to be made hostile; without its list of hashes, which would refuse it at once."""
    shutil.copytree(model, folder)
    (folder / "sha256.json").unlink(missing_ok=True)
    return folder


def altered(file, **more):
    """Settings with something else in them."""
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def external_onnx(file, elsewhere):
    """An ONNX network whose weights lie in another file, wherever that is."""
    import onnx
    from onnx import TensorProto, helper

    kernel = onnx.TensorProto(name="k", data_type=TensorProto.FLOAT, dims=[1, 3, 1, 1])
    kernel.data_location = TensorProto.EXTERNAL
    kernel.external_data.add(key="location", value=str(elsewhere))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", c, "h", "w"]) for n, c in (("x", 3), ("y", 1))]
    graph = helper.make_graph([helper.make_node("Conv", ["x", "k"], ["y"])], "g", ends[:1], ends[1:], [kernel])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    file.write_bytes(model.SerializeToString())
    return file
