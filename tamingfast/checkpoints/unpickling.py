"""Reads pickles as data: nothing that a pickle names is looked up, imported or called.

A pickle is a program for a stack machine whose instructions import names and call what they find. No list of names can
be both complete, as trainers put objects of many libraries beside the weights, and safe: numpy's functions alone let a
pickle write to any address. So the machine below knows no names. A name becomes a `Name`, whatever is called or built
becomes a `Foreign`, and only the functions that rebuild tensors are understood: their arguments are kept as a
`StoredTensor`, which `tamingfast.checkpoints.torch_files` checks and reads. Every instruction works on lists and dicts
of this module, and nothing of the machine's memory is shared with code in C, so no instruction can reach anything else.

Memory and time are bounded by the size of the pickle and `INSTRUCTIONS`: values that a pickle uses again are shared,
not copied; only text and whole numbers are used as keys, because hashing a nested value can take exponential time; and
nothing is recursive.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, Protocol, cast

import numpy as np
import torch

from tamingfast.errors import first_line

#: A pickle may have as many. Those of checkpoints have about forty per tensor.
INSTRUCTIONS = 1 << 24
_LONGEST_NAME = 1000
_RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_NUMBERS = re.compile("[fiu][1248]")  # dtypes of numpy
_MOST_DIMENSIONS = 64  # torch's own limit

_FLOATS = (
    "double",
    "float",
    "half",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
_COMPLEX = ("cfloat", "cdouble", "chalf")
_WHOLE = ("bool", "uint8", "int8", "short", "int", "long", "uint16", "uint32", "uint64")
_QUANTISED = ("qint8", "quint8", "qint32", "quint4x2", "quint2x4")
#: The dtypes of tensors, under their names in pickles.
DTYPES = {
    str(getattr(torch, name)): getattr(torch, name)
    for name in (*_FLOATS, *_COMPLEX, *_WHOLE, *_QUANTISED)
    if hasattr(torch, name)
}
_STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8, "QInt32Storage": torch.qint32, "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4, "UntypedStorage": torch.uint8,
}  # fmt: skip


class Stream(Protocol):
    """What pickles are read from."""

    def read(self, count: int, /) -> bytes:
        """The next ``count`` bytes, or as many as there are."""

    def readline(self) -> bytes:
        """The bytes up to the end of the line."""


class BadPickle(ValueError):
    """Bytes that are no pickle, or one that is damaged or too long."""


@dataclass(frozen=True, slots=True)
class Name:
    """The dotted name of a class or function, which is not looked up."""

    text: str


class Foreign(dict):
    """What a class or function that is not called would have made.

    Has the class's dotted ``name``, the ``arguments`` of its call, the items that the pickle sets, and as ``state``
    what else it says of the object.
    """

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: Any = ()):
        super().__init__()
        self.name, self.arguments, self.state = name, arguments, None


@dataclass(frozen=True, slots=True)
class Storage:
    """The memory of tensors: its key in the file, and how many elements of which dtype it is said to have."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as its file describes it, which need not be possible: a view of a storage, counted in elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unusable:
    """A tensor that is not a dense one of numbers; ``kind`` says what it is."""

    kind: str


class Unpickler:
    """A stack machine for pickles that makes plain values.

    Attributes:
        storages: the storages that the pickles read so far refer to, by key.
    """

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._clear()

    def load(self, stream: Stream) -> Any:
        """The value of the next pickle in ``stream``, which is left behind the pickle.

        The value consists of None, numbers, text, bytes, lists, tuples, dicts with keys of text or whole numbers, and
        the classes of this module. Raises BadPickle.
        """
        try:
            return self._run(stream)
        except Exception as error:  # the parser of the standard library raises errors of many types
            raise BadPickle(first_line(error)[:100]) from error
        finally:
            self._clear()

    def _clear(self) -> None:
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # what lies on the stack below each mark
        self._memo: dict[int, Any] = {}
        self._spent = 0

    def _spend(self, count: int) -> None:
        self._spent += count
        if self._spent > INSTRUCTIONS:
            raise BadPickle(f"more than {INSTRUCTIONS} instructions")

    def _run(self, stream: Stream) -> Any:
        for opcode, argument, _ in pickletools.genops(cast(IO[bytes], stream)):
            self._spend(1)
            if opcode.name in _NOTHING:
                continue
            if opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name]())
            elif opcode.name in _ACTIONS:
                _ACTIONS[opcode.name](self, argument)
            else:
                self._stack.append(argument)
        if self._below or len(self._stack) != 1:
            raise BadPickle("values are left over at its end")
        return self._stack.pop()

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()

    def _tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise BadPickle("too few values for a tuple")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _collect(self, kind: type[list] | type[tuple]) -> None:
        items = self._since_mark()
        self._stack.append(kind(items))

    def _append(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is list:
            self._stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            target.update(_items(zip(items[::2], items[1::2], strict=True)))

    def _new_dict(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append({})
        self._set_items(items)

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _global(self, text: str) -> None:
        self._name(*text.split(" ", 1))

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._name(module, name)

    def _name(self, module: Any, name: Any) -> None:
        if not (isinstance(name, str) and isinstance(module, str) and len(module) + len(name) < _LONGEST_NAME):
            raise BadPickle("a name that is no text or too long")
        if not (module + name).isprintable():
            raise BadPickle("a name with control characters")
        self._stack.append(Name(f"{module}.{name}"))

    def _reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if isinstance(arguments, tuple) and arguments and isinstance(arguments[0], list | dict):
            self._spend(len(arguments[0]))  # `_ordered` copies it
        self._stack.append(_result(function, arguments))

    def _object(self, _: Any) -> None:
        function, *arguments = self._since_mark()
        self._stack.append(_result(function, tuple(arguments)))

    def _instance(self, text: str) -> None:
        arguments = tuple(self._since_mark())
        self._global(text)
        self._stack.append(_result(self._stack.pop(), arguments))

    def _new_with_keywords(self, _: Any) -> None:
        _, _, function = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._stack.append(Foreign(_name_of(function)))

    def _build(self, _: Any) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Foreign):
            target.state = state

    def _persistent(self, _: Any) -> None:
        self._stack.append(self._stored(self._stack.pop()))

    def _stored(self, identity: Any) -> Any:
        """What a persistent id stands for: `Storage`, or the class that old files describe with its source."""
        match identity:
            case ("module", Name() as described, *_):
                return described
            case ("storage", Name(text), str(key), _, int(numel), *view) if view in ([], [None]):
                dtype = _STORAGES.get(text.rpartition(".")[2])
                if dtype is not None and 0 <= numel < 1 << 63:
                    return self.storages.setdefault(key, Storage(key, dtype, numel))
        return Unusable("a storage of an unknown kind")


def numbers(value: Any) -> np.ndarray:
    """The numpy array that a pickle describes, if it is one of numbers; BadPickle for anything else.

    Numpy itself would also make arrays of pointers out of bytes, so only the bytes of numbers are given to it.
    """
    if not (isinstance(value, Foreign) and value.name in _RECONSTRUCT):
        what = _name_of(value) if isinstance(value, Foreign | Name) else type(value).__name__
        raise BadPickle(f"{what}, not an array of numbers")
    match value.state:
        case (int(), tuple(shape), Foreign(name="numpy.dtype", arguments=(str(code), *_)) as dtype, bool(columns), raw):
            swapped = isinstance(dtype.state, tuple) and dtype.state[1:2] == (">",)
        case _:
            raise BadPickle("an object of numpy, not an array of numbers")
    if not _NUMBERS.fullmatch(code):
        raise BadPickle(f"an array of the dtype '{code[:10]}', not an array of numbers")
    try:
        found = np.frombuffer(_raw(raw), np.dtype(code).newbyteorder(">" if swapped else "<"))
        return found.reshape(shape, order="F" if columns else "C").astype(code)
    except (TypeError, ValueError) as error:
        raise BadPickle(f"a damaged array ({first_line(error)[:100]})") from error


def _raw(value: Any) -> Any:
    """The bytes that a pickle describes: before protocol 3, and in those of Python 2, as text of latin-1."""
    if isinstance(value, Foreign) and value.name in ("_codecs.encode", "__builtin__.bytes", "builtins.bytes"):
        value = value.arguments[0] if value.arguments else ""
    return value.encode("latin-1") if isinstance(value, str) else value


def _items(pairs: Any) -> dict[Any, Any]:
    """The pairs whose key is text or a whole number of a machine word: hashing others has no bound."""
    return {key: value for key, value in pairs if type(key) is str or (isinstance(key, int) and key.bit_length() < 64)}


def _name_of(function: Any) -> str:
    return function.text if isinstance(function, Name) else function.name if isinstance(function, Foreign) else "?"


def _result(function: Any, arguments: Any) -> Any:
    """What calling ``function`` stands for. Nothing is called but the functions of this module."""
    name = _name_of(function)
    if name in _KINDS:
        return Unusable(_KINDS[name])
    if name not in _BUILDERS:
        return Foreign(name, arguments)
    if not isinstance(arguments, tuple):
        raise BadPickle(f"a call of '{name}' without a tuple of arguments")
    return _BUILDERS[name](*arguments)


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any = None, _hooks: Any = None, metadata: Any = None
) -> StoredTensor | Unusable:
    return _view(storage, getattr(storage, "dtype", None), offset, shape, stride, metadata)


def _tensor_of_dtype(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> StoredTensor | Unusable:
    return _view(storage, DTYPES.get(_name_of(dtype)), offset, shape, stride, metadata)


def _view(
    storage: Any, dtype: torch.dtype | None, offset: Any, shape: Any, stride: Any, metadata: Any
) -> StoredTensor | Unusable:
    if isinstance(storage, Unusable):
        return storage
    if metadata:
        return Unusable("a conjugated or negated view")
    if dtype is None:
        return Unusable("a tensor of an unknown dtype")
    if str(dtype).removeprefix("torch.") in _QUANTISED:
        return Unusable(_KINDS["torch._utils._rebuild_qtensor"])
    if not (
        isinstance(storage, Storage)
        and type(shape) is type(stride) is tuple
        and len(shape) == len(stride) <= _MOST_DIMENSIONS
        and all(type(n) is int and 0 <= n < 1 << 63 for n in (offset, *shape, *stride))
    ):
        raise BadPickle("a tensor without a storage or with impossible sizes")
    return StoredTensor(storage, dtype, offset, shape, stride)


def _first(value: Any, *_: Any) -> Any:
    return value


def _of_type(function: Any, _type: Any, arguments: Any, *_: Any) -> Any:
    """A tensor of a subclass: ``function(*arguments)``, where the function is not this one again."""
    return Foreign(_name_of(_type)) if _name_of(function) in _OF_TYPE else _result(function, arguments)


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    return _items(pairs.items() if isinstance(pairs, Mapping) else pairs)


_OF_TYPE = (
    "torch._tensor._rebuild_from_type_v2",
    "torch._tensor._rebuild_from_type",
    "torch.tensor._rebuild_from_type",
)
#: What stands for a call of each function that weights are made with.
_BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch.Size": _first,
    "collections.OrderedDict": _ordered,
    **dict.fromkeys(_OF_TYPE, _of_type),
}
_KINDS = {
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values (of the meta device)",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a subclass without memory of its own",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device, stored as a numpy array",
    "torch._utils._rebuild_xla_tensor": "a tensor of another device, stored as a numpy array",
    "torch.distributed.tensor.DTensor": "a part of a distributed tensor",
}

_NOTHING = ("PROTO", "FRAME", "STOP", "READONLY_BUFFER")
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple, "EMPTY_LIST": list,
    "EMPTY_DICT": dict, "EMPTY_SET": list, "NEXT_BUFFER": lambda: Foreign("buffer"),
}  # fmt: skip
# Sets become lists, as their members would have to be hashed.
_ACTIONS: dict[str, Callable[[Unpickler, Any], Any]] = {
    "MARK": Unpickler._mark,
    "POP": Unpickler._pop,
    "POP_MARK": lambda machine, _: machine._since_mark(),
    "DUP": lambda machine, _: machine._stack.append(machine._stack[-1]),
    "TUPLE": lambda machine, _: machine._collect(tuple),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "LIST": lambda machine, _: machine._collect(list),
    "FROZENSET": lambda machine, _: machine._collect(list),
    "APPEND": lambda machine, _: machine._append([machine._stack.pop()]),
    "APPENDS": lambda machine, _: machine._append(machine._since_mark()),
    "ADDITEMS": lambda machine, _: machine._append(machine._since_mark()),
    "DICT": Unpickler._new_dict,
    "SETITEM": lambda machine, _: machine._set_items([machine._stack.pop(-2), machine._stack.pop()]),
    "SETITEMS": lambda machine, _: machine._set_items(machine._since_mark()),
    **dict.fromkeys(
        ("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine._stack.append(machine._memo[index])
    ),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), Unpickler._put),
    "MEMOIZE": lambda machine, _: machine._put(len(machine._memo)),
    "GLOBAL": Unpickler._global,
    "STACK_GLOBAL": Unpickler._stack_global,
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), lambda machine, code: machine._stack.append(Name(f"extension.{code}"))),
    "REDUCE": Unpickler._reduce,
    "NEWOBJ": Unpickler._reduce,
    "NEWOBJ_EX": Unpickler._new_with_keywords,
    "OBJ": Unpickler._object,
    "INST": Unpickler._instance,
    "BUILD": Unpickler._build,
    "BINPERSID": Unpickler._persistent,
    "PERSID": lambda machine, text: machine._stack.append(machine._stored(text)),
}
