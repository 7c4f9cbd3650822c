"""Whatever a pickle in a checkpoint says, reading it calls nothing, touches no other memory and ends soon."""

from __future__ import annotations

import pickle
import pickletools
import random
import struct
import threading
from collections.abc import Callable

import hostile
import numpy as np
import pytest
import torch

from tamingfast.checkpoints.unpickling import BadPickle, Foreign, Name, StoredTensor, Unpickler
from tamingfast.checkpoints.weights import read_checkpoint, read_state_dict
from tamingfast.errors import UserError

CALLS = ("os\nsystem", "posix\nsystem", "builtins\neval", "builtins\nexec", "builtins\n__import__", "subprocess\nPopen",
         "torch\nload", "torch._utils\n_rebuild_tensor_v2", "torch.storage\n_load_from_bytes", "numpy\nload",
         "runpy\nrun_path", "tamingfast.files\nwrite_text", "builtins\ngetattr", "functools\npartial", "ctypes\nCDLL",
         "numpy.core.multiarray\n_reconstruct", "numpy._core.multiarray\nscalar", "numpy\ndtype", "numpy\nndarray",
         "collections\nOrderedDict", "torch\nFloatStorage", "copyreg\n_reconstructor")  # fmt: skip


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def load(pickled: bytes) -> object:
    import io

    return Unpickler().load(io.BytesIO(pickled))


def calls(name: str, argument: bytes) -> dict[str, bytes]:
    """Every way in which a pickle can call or build what it names."""
    module, leaf = name.split("\n")
    glob = b"c" + name.encode() + b"\n"
    return {
        "reduce": glob + b"(" + argument + b"tR",
        "new object": glob + b"(" + argument + b"t\x81",
        "new object with keywords": glob + b"(" + argument + b"t}\x92",
        "object": b"(" + glob + argument + b"o",
        "instance": b"(" + argument + b"i" + name.encode() + b"\n",
        "build": glob + argument + b"b",
        "build the state of an object": glob + b")R" + b"}" + text("__setstate__") + glob + b"sb" + argument + b"b",
        "name from the stack": text(module) + text(leaf) + b"\x93(" + argument + b"tR",
        "dotted name": text("builtins") + text(f"__import__.{leaf}") + b"\x93(" + argument + b"tR",
        "items": glob + b")R(" + argument + argument + b"u",
        "appends": glob + b")R(" + argument + b"e",
        "members": glob + b")R(" + argument + b"\x90",
        "extension": b"\x82\x01(" + argument + b"tR",
        "persistent": b"(" + text("module") + glob + text("/etc/passwd") + argument + b"tQ",
    }


def test_no_way_of_calling_calls(tmp_path):
    number = 0
    for name in CALLS:
        for body in calls(name, text("echo ran")).values():
            beside = b"\x80\x04}(" + text("w") + b"N" + text("beside") + body + b"u."
            for write in (hostile.zipped, hostile.legacy):
                write(tmp_path / f"{number:04}.ckpt", beside)
                number += 1
    ends, seen = hostile.read_watched(tmp_path)
    assert len(ends) == number and set(ends.values()) == {"refused"}, set(ends.values())
    assert not seen


def object_arrays() -> dict[str, bytes]:
    """Pickles that build numpy values whose bytes would be pointers, in the four places that numpy has for them."""
    pointers = b"C\x08" + b"A" * 8
    glob = {name: f"c{module}\n{name}\n".encode() for module, name in (
        ("numpy", "dtype"), ("numpy", "ndarray"), ("numpy.core.multiarray", "scalar"),
        ("numpy.core.multiarray", "_reconstruct"),
    )}  # fmt: skip
    # The state of a dtype: version, byte order, ..., flags; without flags numpy takes bytes for pointers.
    dtype = (
        glob["dtype"]
        + b"("
        + text("O8")
        + b"\x89\x88tR(K\x03"
        + text("|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    )
    array = glob["_reconstruct"] + b"(" + glob["ndarray"] + b"K\0\x85" + b"C\x01btR"
    return {
        "scalar": glob["scalar"] + b"(" + dtype + pointers + b"tR",
        "_reconstruct": array + b"(K\x01K\x01\x85" + dtype + b"\x89" + pointers + b"tb",
        "dtype": dtype,
        "ndarray": glob["ndarray"] + b"(K\x01\x85" + dtype + pointers + b"tR",
    }


def test_object_dtypes_in_all_four_places(tmp_path):
    for place, body in object_arrays().items():
        for core in (b"numpy.core.", b"numpy._core."):
            body = body.replace(b"numpy.core.", core)
            pickled = b"\x80\x04}" + text("state_dict") + body + b"s."
            hostile.zipped(tmp_path / f"{place}{core.decode()}.ckpt", pickled)
            hostile.legacy(tmp_path / f"{place}{core.decode()}.old.ckpt", pickled)
    ends, seen = hostile.read_watched(tmp_path)
    assert len(ends) == 16 and set(ends.values()) == {"refused"} and not seen


def random_pickle(chance: random.Random) -> bytes:
    """Instructions of all kinds, most of them with valid arguments, in any order."""
    body = b"\x80" + bytes([chance.choice((2, 2, 4, 5))])
    for _ in range(chance.randrange(2, 60)):
        opcode = chance.choice(pickletools.opcodes)
        body += opcode.code.encode("latin-1") + argument(opcode, chance)
    return body + b"."


def argument(opcode: pickletools.OpcodeInfo, chance: random.Random) -> bytes:
    kind = opcode.arg
    if kind is None:
        return b""
    if opcode.name in ("GLOBAL", "INST"):
        return chance.choice(CALLS).encode() + b"\n"
    if kind.n > 0:
        return bytes(chance.choice((0, 0, 1, 2, 3, 255)) if i == 0 else 0 for i in range(kind.n))
    if kind.n == pickletools.UP_TO_NEWLINE:
        return chance.choice((b"0", b"1", b"-7", b"'a'", b"1.5", b"x", b"99999999999999999999")) + b"\n"
    size = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(kind.n, 4)
    count = chance.choice((0, 1, 3, 7, 2**31 - 1 if size > 1 else 200))
    return count.to_bytes(size, "little") + bytes(chance.choices(b"storage\xff", k=min(count, 7)))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(1, 11))])
def test_random_pickles(seed, tmp_path):
    chance, ends_by_kind = random.Random(seed), set()
    for number in range(1000):
        (hostile.zipped, hostile.legacy)[number % 2](tmp_path / f"{number:04}.ckpt", random_pickle(chance))
    ends, seen = hostile.read_watched(tmp_path)
    ends_by_kind |= set(ends.values())
    assert len(ends) == 1000 and ends_by_kind <= {"read", "refused"}, ends_by_kind
    assert not seen


def test_random_pickles_reach_every_instruction():
    chance, met = random.Random(0), set()
    for _ in range(300):
        pickled = random_pickle(chance)
        met |= {opcode.name for opcode in pickletools.opcodes if opcode.code.encode("latin-1") in pickled}
    assert met == {opcode.name for opcode in pickletools.opcodes}


def ends_soon(action: Callable[[], object], seconds: float = 60) -> None:
    """Fail if the action, which may raise UserError or BadPickle, does not come to an end; not a measure of speed."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except (UserError, BadPickle):
            pass
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "does not end"
    assert not failure, failure


def bombs() -> dict[str, bytes]:
    nested = (
        b"\x80\x02"
        + b"]q\x00"
        + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(100))
    )
    tuples = (
        b"\x80\x02"
        + b")q\x00"
        + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(100))
    )
    long = b"](" + b"N" * 100_000 + b"eq\x00"
    pairs = b"](" + b"NN\x86" * 50_000 + b"eq\x00"
    many = b"}(" + b"".join(text(f"k{i}") + b"N" for i in range(50_000)) + b"uq\x00"
    name = text("a" * 900_000) + b"q\x00"
    large = b"\x8b" + struct.pack("<i", 1_000_000) + b"\x7f" * 1_000_000
    ordered, rebuild = b"ccollections\nOrderedDict\nq\x01(", b"ctorch._utils\n_rebuild_tensor_v2\nq\x01("
    return {
        "nested lists of doubling size": nested + b".",
        "as a key": b"\x80\x02}" + tuples[2:] + b"Ns.",
        "in a set": b"\x80\x04\x8f(" + tuples[2:] + b"\x90.",
        "in a frozen set": b"\x80\x04(" + tuples[2:] + b"\x91.",
        "as global_step": b"\x80\x02}" + text("global_step") + nested[2:] + b"s.",
        "as a state_dict": b"\x80\x02}" + text("state_dict") + nested[2:] + b"s.",
        "deep lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
        "deep tuples": b"\x80\x02" + b"N" + b"\x85" * 200_000 + b".",
        "deep objects": b"\x80\x02" + b"ca\nb\n)R" * 100_000 + b"b" * 99_999 + b".",
        "a far memo": b"\x80\x02}r\xff\xff\xff\xff.",
        "a far memo as text": b"\x80\x02}p999999999999999999\n.",
        "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
        "a long byte array": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
        "a long text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.",
        "a long number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
        "digits": b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.",
        "a large number as a key": b"\x80\x02}" + large + b"q\x00(" + b"h\x00N" * 100_000 + b"u.",
        "ordered copies": b"\x80\x02" + pairs + b"0" + ordered + b"h\x01h\x00\x85R" * 100_000 + b"t.",
        "states": b"\x80\x02" + many + b"0(" + b"ca\nb\n)Rh\x00b" * 100_000 + b"t.",
        "names": b"\x80\x04" + name + b"0(" + b"h\x00h\x00\x93" * 100_000 + b"t.",
        "shapes": b"\x80\x02" + long + b"0" + rebuild + b"h\x01(Nh\x00h\x00h\x00tR" * 100_000 + b"t.",
        "a stream of instructions": b"\x80\x02" + b"N0" * 200_000 + b"N.",
    }  # fmt: skip


@pytest.mark.parametrize("bomb", bombs())
@pytest.mark.parametrize("write", [hostile.zipped, hostile.legacy])
def test_bombs(bomb, write, tmp_path):
    path = write(tmp_path / "x.ckpt", bombs()[bomb])
    ends_soon(lambda: read_checkpoint(path))
    ends_soon(lambda: read_checkpoint(path, tensors=False).number("global_step", "epoch"))


def test_a_pickle_has_a_number_of_instructions(monkeypatch):
    monkeypatch.setattr("tamingfast.checkpoints.unpickling.INSTRUCTIONS", 1000)
    assert load(b"\x80\x02" + b"N0" * 400 + b"N.") is None
    with pytest.raises(BadPickle, match="more than 1000"):
        load(b"\x80\x02" + b"N0" * 600 + b"N.")
    copies = b"\x80\x02](" + b"NN\x86" * 100 + b"eq\x000ccollections\nOrderedDict\nq\x010(" + b"h\x01h\x00\x85R" * 9
    with pytest.raises(BadPickle, match="more than 1000"):  # what is copied counts, too
        load(copies + b"t.")


@pytest.mark.parametrize(
    ("shape", "stride", "offset", "numel"),
    [
        ((5,), (1,), 0, 4), ((4,), (1,), 1, 4), ((2, 2), (3, 1), 0, 4), ((4,), (1,), 0, 400), ((4,), (1,), 0, 2**62),
        ((4,), (1,), 0, -4), ((-4,), (1,), 0, 4), ((4,), (-1,), 3, 4), ((4,), (1,), -1, 4), ((4,), (1, 1), 0, 4),
        ((2**40, 2**40), (0, 0), 0, 4), ((2**62,), (0,), 0, 4), ((10**9,), (0,), 0, 4), ((1.5,), (1,), 0, 4),
        ((True,), (1,), 0, 4), ("4", "1", 0, 4), ((4,), (2**63,), 0, 4), ((2**64,), (1,), 0, 4),
        ((1,) * 65, (1,) * 65, 0, 4),        ((2**62, 0, 2**62), (0, 0, 0), 0, 4), ([4], [1], 0, 4), ((), (), 4, 4),
    ],
)  # fmt: skip
def test_tensors_beyond_their_memory(shape, stride, offset, numel, tmp_path):
    pickled = hostile.tensor(shape, stride, offset, numel)
    memory = hostile.four_floats()
    count = struct.pack("<q", numel if -(2**63) <= numel < 2**63 else 4)
    for path in (
        hostile.zipped(tmp_path / "x.ckpt", pickled, {"data/0": memory}),
        hostile.legacy(tmp_path / "old.ckpt", pickled, ("0",), count + memory),
    ):
        with pytest.raises(UserError, match=path.name):
            read_state_dict(path)


def test_the_same_tensors_within_their_memory(tmp_path):
    pickled = hostile.tensor((2, 2), (1, 2), 0)
    for path in (
        hostile.zipped(tmp_path / "x.ckpt", pickled, {"data/0": hostile.four_floats()}),
        hostile.legacy(tmp_path / "old.ckpt", pickled, ("0",), struct.pack("<q", 4) + hostile.four_floats()),
    ):
        assert torch.equal(read_state_dict(path)["w"], torch.tensor([[0.0, 2.0], [1.0, 3.0]]))


def test_a_state_dict_within_an_object_of_anybody(tmp_path):
    """A subclass of dict is read for its items, and an object's attributes are kept, but neither is made."""
    content = load(b"\x80\x02cmine\nStates\n)R" + text("a") + b"K\x01s.")
    assert type(content) is Foreign and content.name == "mine.States" and content["a"] == 1
    content = load(b"\x80\x02cargparse\nNamespace\n)\x81}" + text("a") + b"K\x01sb.")
    assert type(content) is Foreign and content.state == {"a": 1} and not content
    assert load(b"\x80\x02cos\nsystem\n.") == Name("os.system")


def test_values_beside_tensors_are_plain():
    value = {"a": [1, 2.5, True, None, "x", b"y", (1, 2)], 3: {"b": 2**40}, "set": {1}, 2.5: 1, None: 2, (1, 2): 3}
    for protocol in range(6):
        found = load(pickle.dumps(value, protocol))
        expected = [1, 2.5, True, None, "x", b"y", (1, 2)]
        if protocol < 3:  # bytes are a call there
            expected[5] = found["a"][5]
            assert isinstance(found["a"][5], Foreign)
        assert found["a"] == expected and found[3] == {"b": 2**40} and set(found) == {"a", 3, "set"}


def test_numpy_values_are_foreign(tmp_path):
    for value in (np.zeros(3), np.float32(1), np.dtype("O"), np.array(["x"], dtype=object), np.random.default_rng(0)):
        assert isinstance(load(pickle.dumps({"x": value}, 2))["x"], Foreign)


def test_tensors_are_only_described(tmp_path):
    torch.save({"a": torch.ones(2, 3)}, tmp_path / "x.pt")
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        found = load(archive.read("x/data.pkl"))
    assert isinstance(found["a"], StoredTensor) and found["a"].shape == (2, 3) and found["a"].storage.numel == 6
