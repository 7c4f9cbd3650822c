"""Weights go into the model that they are of, whatever a wrapper or a trainer has put around them, or nowhere."""

from __future__ import annotations

import collections
import copy

import golden
import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from torch import nn

import tamingfast
from tamingfast import checkpoints
from tamingfast.checkpoints.load import init_from_ckpt
from tamingfast.checkpoints.seal import check_seal
from tamingfast.checkpoints.weights import load_into, metadata_of, read_checkpoint, read_state_dict, unwrapped
from tamingfast.errors import UserError

PREFIXES = ("module.", "ddp.", "_orig_mod.", "model.", "first_stage_model.", "module._orig_mod.", "model.net.vqgan.",
            "_forward_module.module.")  # fmt: skip


def vqgan(seed: int = 0, loss: bool = False, **params) -> nn.Module:
    torch.manual_seed(seed)
    made = tiny.config(tiny.VQGAN, params)
    if not loss:
        made["model"]["params"]["lossconfig"] = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}
    return tiny.build(made)


def same(model: nn.Module, state: dict) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], value) for key, value in state.items())


def refused(action, *words: str) -> None:
    with pytest.raises(UserError) as error:
        action()
    text = str(error.value)
    assert all(word in text for word in words) and "\n" not in text, text
    assert ": got " in text and ", expected " in text


# --- wrappers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_shared_prefix_is_taken_off_wherever_weights_are_read(prefix, tmp_path):
    state = vqgan(7).state_dict()
    wrapped = {prefix + key: value for key, value in state.items()} | {"loss.logvar": torch.zeros(1)}
    path = tmp_path / "wrapped.ckpt"
    torch.save({"state_dict": wrapped}, path)
    config = copy.deepcopy(tiny.VQGAN["model"])
    config["params"]["lossconfig"] = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}
    assert same(tamingfast.load_model(path, {"model": config}), state)
    assert same(tamingfast.load_model(path), state)
    assert same(vqgan(0, ckpt_path=str(path)), state)
    assert tamingfast.tasks.inspect(path)["first_stage"] == checkpoints.fingerprint.fingerprint(state)
    moved = vqgan(1)
    load_into(moved, wrapped, path, optional=("loss.",))
    assert same(moved, state)


def test_wrappers_of_parts_are_taken_off():
    state = {"encoder._orig_mod.conv_in.weight": 1, "decoder.module.conv_in.weight": 2, "quant_conv.weight": 3}
    assert list(unwrapped(state, ())) == ["encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"]


def test_a_name_that_two_keys_would_share_is_kept():
    state = {"a.module.b": 1, "a.b": 2}
    assert unwrapped(state, ()) == state


@pytest.mark.parametrize(
    ("keys", "known", "expected"),
    [
        (["a.b.c", "a.b.d"], ["c", "d"], ["c", "d"]),
        (["a.b.c", "a.b.d"], ["b.c"], ["b.c", "b.d"]),
        (["a.b.c", "a.b.d"], ["a.b.c", "x"], ["a.b.c", "a.b.d"]),
        (["a.b.c", "a.b.d"], ["x"], ["a.b.c", "a.b.d"]),
        (["a.b.c", "x.b.d"], ["b.c"], ["a.b.c", "x.b.d"]),
        (["a.b", "loss.c", "model_ema.d"], ["b"], ["b", "loss.c", "model_ema.d"]),
        (["loss.c"], ["c"], ["loss.c"]),
        ([], ["a"], []),
    ],
)
def test_the_prefix_that_goes_is_the_one_that_makes_keys_known(keys, known, expected):
    assert list(unwrapped(dict.fromkeys(keys), known)) == expected


@pytest.mark.parametrize("others", [{"discriminator.main.weight": torch.ones(2)}, {"ema.": None}])
def test_a_prefix_that_other_keys_lack_is_named(others, tmp_path):
    state = vqgan(7).state_dict()
    if "ema." in others:
        others = {"ema." + key: value + 1 for key, value in state.items()}
    path = tmp_path / "wrapped.ckpt"
    torch.save({"generator." + key: value for key, value in state.items()} | others, path)
    config = {"model": copy.deepcopy(tiny.VQGAN["model"])}
    for given in (config, None):
        refused(
            lambda given=given: tamingfast.load_model(path, given), "wrapped.ckpt", "'generator.encoder.conv_in.weight'"
        )


def test_averaged_models_are_unwrapped(tmp_path):
    state = vqgan(7).state_dict()
    path = tmp_path / "averaged.ckpt"
    torch.save({"module." + key: value for key, value in state.items()} | {"n_averaged": torch.tensor(3)}, path)
    assert same(tamingfast.load_model(path), state) and same(vqgan(0, ckpt_path=str(path)), state)


def test_a_wrapped_prior(tmp_path):
    path = golden.checkpoint("net2net_class")
    state = read_state_dict(path)
    torch.save({"module." + key: value for key, value in state.items()}, tmp_path / "wrapped.ckpt")
    (tmp_path / "wrapped.yaml").write_bytes(path.with_suffix(".yaml").read_bytes())
    model, known = tamingfast.load_model(tmp_path / "wrapped.ckpt"), tamingfast.load_model(path)
    assert same(model, known.state_dict())


def test_a_wrapped_prior_without_config_is_a_prior(tmp_path):
    torch.save({"module.transformer.tok_emb.weight": torch.zeros(2, 2)}, tmp_path / "wrapped.ckpt")
    refused(lambda: tamingfast.load_model(tmp_path / "wrapped.ckpt"), "transformer without a config")


# --- where a run begins with weights of a file -----------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    """A first stage with the discriminator of its training, in a file."""
    path = tmp_path / "vq.ckpt"
    model = vqgan(7, loss=True)
    content = dict(model.state_dict()) | {"loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}
    torch.save({"state_dict": content}, path)
    return path


def change(path, **changes):
    state = read_state_dict(path)
    for key, value in changes.items():
        key = key.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    torch.save({"state_dict": state}, path)


def test_what_the_original_loads_is_loaded(file):
    """With and without a loss on either side."""
    with_loss, without = vqgan(0, loss=True, ckpt_path=str(file)), vqgan(0, ckpt_path=str(file))
    state = read_state_dict(file)
    for model in (with_loss, without):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    torch.save({"state_dict": without.state_dict()}, file)
    assert torch.equal(vqgan(0, loss=True, ckpt_path=str(file)).decoder.conv_out.bias, without.decoder.conv_out.bias)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_conv__bias": None}, ["got no 'quant_conv.bias'", "1 keys missing", "ignore_keys"]),
        ({"encoder__extra": torch.zeros(1)}, ["'encoder.extra', which the model lacks", "1 left over"]),
        ({"quant_conv__bias": torch.zeros(5)}, ["got shape (5,) for 'quant_conv.bias'"]),
        ({"quant_conv__bias": torch.full((4,), torch.nan)}, ["4 non-finite values of 4 in 'quant_conv.bias'"]),
        ({"quant_conv__bias": torch.zeros(4, dtype=torch.complex64)}, ["complex numbers in 'quant_conv.bias'"]),
        ({"quant_conv__bias": torch.zeros(4, dtype=torch.int8)}, ["got int8 numbers in 'quant_conv.bias'"]),
    ],
)
def test_a_file_of_which_only_a_part_fits_is_refused(changes, words, file):
    change(file, **changes)
    refused(lambda: vqgan(0, ckpt_path=str(file)), "vq.ckpt", *words)
    refused(lambda: tamingfast.load_model(file, {"model": tiny.VQGAN["model"]}), "vq.ckpt", *words[:1])


@pytest.mark.parametrize("keys", [["quant_conv"], ["quant_conv.bias", "encoder.conv_in"], ["quant_conv.b"]])
def test_what_is_left_out_on_purpose_may_be_missing(keys, file):
    change(file, quant_conv__bias=None)
    model = vqgan(0, ckpt_path=str(file), ignore_keys=keys)
    assert torch.equal(model.decoder.conv_out.bias, read_state_dict(file)["decoder.conv_out.bias"])


def test_a_file_of_another_model_is_refused(file, tmp_path):
    torch.save({"state_dict": {"a.weight": torch.zeros(3), "b.weight": torch.zeros(3)}}, file)
    refused(lambda: vqgan(0, ckpt_path=str(file)), "vq.ckpt", "2 left over")
    refused(lambda: vqgan(0).init_from_ckpt(golden.checkpoint("net2net_class")), "net2net_class.ckpt")


def test_a_prior_begins_with_a_file_of_the_original():
    """Its masks are no weights; the loss of its first stage is left out."""
    path = golden.checkpoint("net2net_class")
    model = tamingfast.load_model(path)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.transformer.head.weight.zero_()
    init_from_ckpt(model, path)
    assert same(model, before)


@pytest.mark.parametrize(
    "mask", [torch.ones(3), torch.ones(1, 1, 4, 5), torch.ones(1, 1, 0, 0), torch.zeros(1, 1, 4, 4)]
)
def test_masks_that_cannot_be(mask, tmp_path):
    path = golden.checkpoint("net2net_class")
    state = read_state_dict(path) | {"transformer.blocks.0.attn.mask": mask}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    refused(lambda: tamingfast.load_model(path).init_from_ckpt(tmp_path / "x.ckpt"), "x.ckpt", "attn.mask")


# --- values ----------------------------------------------------------------------------------------------------------


def test_float8_weights_are_read(file):
    state = {key: value.to(torch.float8_e4m3fn) for key, value in vqgan(7).state_dict().items()}
    torch.save(state, file)
    assert all(torch.equal(own, state[key].float()) for key, own in vqgan(0, ckpt_path=str(file)).state_dict().items())
    state["quant_conv.bias"] = torch.full((4,), torch.nan).to(torch.float8_e4m3fn)
    torch.save(state, file)
    refused(lambda: vqgan(0, ckpt_path=str(file)), "non-finite values of 4 in 'quant_conv.bias'")


def test_complex_weights_are_refused_wherever_they_are_used(file):
    change(file, quant_conv__bias=torch.ones(4, dtype=torch.complex64))
    for action in (lambda: tamingfast.load_model(file), lambda: read_state_dict(file)):
        refused(action, "vq.ckpt", "complex numbers in 'quant_conv.bias'")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "a quantised tensor"),
        (lambda: torch.ones(2, 2).to_sparse(), "a sparse tensor"),
        (lambda: torch.empty(4, device="meta"), "a tensor without values"),
        (lambda: torch.zeros(4, dtype=torch.complex64).conj(), "a conjugated or negated view"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_are_not_dense_are_named(make, words, zipped, tmp_path):
    torch.save({"a": torch.ones(2), "b": make()}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    refused(lambda: read_state_dict(tmp_path / "x.ckpt"), "x.ckpt", words, " as 'b'")


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn,
          torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64)  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_all_that_torch_saves_is_read_as_torch_reads_it(zipped, protocol, tmp_path):
    base = torch.randn(6, 8)
    state = {str(dtype): torch.arange(-3, 9).reshape(3, 4).to(dtype) for dtype in DTYPES}
    state |= {
        "transposed": base.t(), "view": base[1:3, 2:5], "parameter": nn.Parameter(base), "empty": torch.empty(0, 3),
        "number": torch.tensor(3.0), "expanded": torch.ones(1).expand(5), "tied": base, "buffer": nn.Buffer(base),
        "subclass": base.as_subclass(type("Mine", (torch.Tensor,), {"__module__": __name__})),
    }  # fmt: skip
    globals()["Mine"] = type(state["subclass"])
    content = {"state_dict": collections.OrderedDict(state), "optimizer_states": [{"state": {0: {"step": 3}}}]}
    path = tmp_path / "x.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    found = read_checkpoint(path).state
    assert list(found) == list(state)
    for key, value in state.items():
        assert type(found[key]) is torch.Tensor and found[key].dtype == value.dtype, key
        assert found[key].stride() == value.stride() and found[key].shape == value.shape, key
        wide = torch.complex128 if value.is_complex() else torch.float64
        assert torch.equal(found[key].to(wide), value.detach().as_subclass(torch.Tensor).to(wide)), key


def test_tied_weights_share_their_memory(tmp_path):
    base = torch.randn(3)
    torch.save({"a": base, "b": base[1:]}, tmp_path / "x.ckpt")
    found = read_state_dict(tmp_path / "x.ckpt")
    assert found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()


def test_default_dtypes_and_devices_do_not_matter(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "x.ckpt")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = read_state_dict(tmp_path / "x.ckpt")["a"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and found.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (nn.Linear(2, 2), "a pickled object of 'torch.nn.modules.linear.Linear', whose class is not run"),
        ({"model": nn.Linear(2, 2)}, "a pickled object of 'torch.nn.modules.linear.Linear'"),
        ({"a": np.zeros(3)}, "a mapping of 1 entries with an object of 'numpy._core.multiarray._reconstruct'"),
        ({"state_dict": {"a": 1}}, "a mapping of 1 entries such as 'a'"),
        ([torch.ones(2)], "a value of the type list"),
        (torch.ones(2), "a value of the type StoredTensor"),
        ({"\x1b[31m" + "x" * 500 + "\n": 1}, "..."),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_files_without_a_state_dict_say_what_they_hold(content, words, zipped, tmp_path):
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    refused(lambda: read_state_dict(tmp_path / "x.ckpt"), "x.ckpt: got no weights but", words)


@pytest.mark.parametrize(
    "place",
    [
        lambda state: {"state_dict_ema": state}, lambda state: {"params_ema": state, "step": torch.ones(())},
        lambda state: {"module": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        lambda state: {"model": {"state_dict": state}}, lambda state: {"state_dict": {"model": state}, "epoch": 3},
        lambda state: {"model": "vqgan", "weights": state}, lambda state: {**state, "extra": {"c": torch.ones(1)}},
        lambda state: state | {"n_averaged": torch.ones(())},
    ],
)  # fmt: skip
def test_the_only_weights_of_a_file_are_meant(place, tmp_path):
    torch.save(place({"a": torch.ones(2), "b": torch.zeros(1)}), tmp_path / "x.ckpt")
    assert [key for key in read_state_dict(tmp_path / "x.ckpt") if key != "n_averaged"] == ["a", "b"]


def test_of_several_networks_none_is_taken(tmp_path):
    state = {"a": torch.ones(2)}
    for content in ({"net": state, "net_ema": state}, {"model": {"net": state, "discriminator": state}}):
        torch.save(content, tmp_path / "x.ckpt")
        refused(lambda: read_state_dict(tmp_path / "x.ckpt"), "x.ckpt: got several networks", "net")


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_where_weights_are_kept(key, tmp_path):
    torch.save({key: {"a": torch.ones(2)}, "epoch": 3, "other": torch.zeros(1)}, tmp_path / "x.ckpt")
    assert list(read_state_dict(tmp_path / "x.ckpt")) == ["a"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(5, 5), ("5", 5), (0, 0), (True, None), (-1, None), (2**70, None), ("9" * 5000, None), ("x", None), (1.5, None),
     (5.0, 5), (float("inf"), None), (float("nan"), None),
     (np.int64(3), None), ([[]], None), (None, None), ("٣", None)],
)  # fmt: skip
def test_counts_are_read_carefully(value, expected, tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "global_step": value}, tmp_path / "x.ckpt")
    assert read_checkpoint(tmp_path / "x.ckpt").number("global_step", "step") == expected
    assert tamingfast.tasks.inspect(tmp_path / "x.ckpt")["global_step"] == expected


@pytest.mark.parametrize("progress", [{"step": 4}, 7, ["step"], None])
def test_progress_that_is_none(progress, tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "progress": progress}, tmp_path / "x.ckpt")
    expected = 4 if isinstance(progress, dict) else None
    assert read_checkpoint(tmp_path / "x.ckpt").number("step") == expected


# --- writing ---------------------------------------------------------------------------------------------------------


def test_written_weights_carry_a_checksum(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoints.save_weights(path, {"a": torch.ones(3)}, {"step": "3"})
    check_seal(path)
    with safe_open(path, framework="pt") as stream:
        assert stream.metadata()["sha256"].strip("0")
    assert metadata_of(path)["step"] == "3"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\0")
    refused(lambda: read_state_dict(path), "x.safetensors", "checksum")


@pytest.mark.parametrize("name", ["x\n\x1b[31m" + "y" * 10_000, "a\rb", "é\u2028漢"])
def test_names_in_files_do_not_break_messages(name, tmp_path, file):
    path = tmp_path / "x.safetensors"
    checkpoints.save_weights(path, {name: torch.ones(2), **vqgan(7).state_dict()})
    torch.save({name: torch.ones(2).to_sparse()}, tmp_path / "sparse.ckpt")
    torch.save({name: torch.full((2,), torch.nan)}, tmp_path / "nan.ckpt")
    torch.save({name: torch.ones(2, dtype=torch.complex64)}, tmp_path / "complex.ckpt")
    for used in (path, *(tmp_path / f"{kind}.ckpt" for kind in ("sparse", "nan", "complex"))):
        with pytest.raises(UserError) as error:
            vqgan(0, ckpt_path=str(used))
        text = str(error.value)
        assert used.name in text and len(text) < 700 and text.isprintable()
