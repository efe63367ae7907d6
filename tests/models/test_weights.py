"""The loader: every value lands where it belongs on every mesh, and every broken folder is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jlora.errors import ModelError
from jlora.models.config import ModelConfig
from jlora.models.decoder import Linear
from jlora.models.weights import dummy_weights, load_weights
from jlora.sharding import Layout, make_mesh
from tests.tiny import FAMILIES, write_tensors

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def load(folder, tp=1, dtype="float32", **options):
    layout = Layout(ModelConfig.from_folder(folder), tp)
    return load_weights(folder, layout, make_mesh(tp), dtype, **options)


def head(model):
    assert model.head is not None
    return model.head.kernel[...]


def take(tensor, rows, columns=None):
    """tensor[rows][:, columns], zeros at -1: the obviously right gather."""
    out = np.zeros((len(rows), *tensor.shape[1:]), tensor.dtype)
    for at, row in enumerate(rows):
        if row >= 0:
            out[at] = tensor[row]
    return out if columns is None else take(out.T, columns).T


def unfused(stored, cfg):
    """The tensors under the names that they would have if none were fused."""
    q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    cuts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    at = {"qkv_proj": (q, q + kv), "gate_up_proj": (cfg.mlp,)}
    out = {}
    for name, tensor in stored.items():
        module = name.split(".")[-2]
        parts = np.split(tensor, at[module]) if module in cuts else [tensor]
        for part, rows in zip(cuts.get(module, (module,)), parts, strict=True):
            out[name.replace(module, part)] = rows
    return out


def check_experts(experts, stored, prefix, facts, layout):
    """The names of the tensors that the experts of a layer hold."""
    block = prefix + (
        "block_sparse_moe" if f"{prefix}block_sparse_moe.gate.weight" in stored else "mlp"
    )
    names = ("w1", "w3", "w2") if "sparse" in block else ("gate_proj", "up_proj", "down_proj")
    np.testing.assert_array_equal(experts.router[...], stored[f"{block}.gate.weight"].T)
    width, tp, embed = len(layout.expert_index) // layout.tp, layout.tp, layout.cfg.embed
    gate_up = np.asarray(experts.gate_up[...]).reshape(tp, facts.count, 2, width, embed)
    down = np.asarray(experts.down[...]).reshape(facts.count, embed, tp, width)
    used = {f"{block}.gate.weight"}
    for expert in range(facts.count):
        tensors = [f"{block}.experts.{expert}.{name}.weight" for name in names]
        rows = [take(stored[name], layout.expert_index) for name in tensors[:2]]
        rows.append(take(stored[tensors[2]].T, layout.expert_index))
        for got, want in zip(
            [*np.moveaxis(gate_up[:, expert], 1, 0), down[expert].transpose(1, 2, 0)],
            rows,
            strict=True,
        ):
            np.testing.assert_array_equal(got.reshape(tp * width, embed), want)
        used.update(tensors)
    return used


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_holds_its_checkpoint_rows(tiny_model, family, tp):
    folder = tiny_model(family)
    cfg = ModelConfig.from_folder(folder)
    layout, model = Layout(cfg, tp), load(folder, tp)
    stored = unfused(load_file(folder / "model.safetensors"), cfg)
    embed = take(stored["model.embed_tokens.weight"], layout.vocab_index)
    np.testing.assert_array_equal(model.embed[...], embed)
    top = embed if cfg.tied else take(stored["lm_head.weight"], layout.vocab_index)
    np.testing.assert_array_equal(head(model), top.T)
    np.testing.assert_array_equal(model.norm[...], stored["model.norm.weight"])
    used = {
        "model.embed_tokens.weight",
        "model.norm.weight",
        *({} if cfg.tied else ["lm_head.weight"]),
    }
    for number, layer in enumerate(model.layers):
        prefix = f"model.layers.{number}."
        names = {
            "attn_norm": "input_layernorm",
            "mlp_norm": "post_attention_layernorm",
            "q_norm": "self_attn.q_norm",
            "k_norm": "self_attn.k_norm",
        }
        if "gemma" in family:  # the same name, another norm
            names |= {
                "attn_post_norm": "post_attention_layernorm",
                "mlp_norm": "pre_feedforward_layernorm",
                "mlp_post_norm": "post_feedforward_layernorm",
            }
        for mine, theirs in names.items():
            name = f"{prefix}{theirs}.weight"
            assert (getattr(layer, mine) is None) == (name not in stored)
            if name in stored:
                used.add(name)
                np.testing.assert_array_equal(getattr(layer, mine)[...], stored[name])
        if cfg.experts is not None and cfg.is_sparse(number):
            used |= check_experts(layer.experts, stored, prefix, cfg.experts, layout)
        for group in cfg.groups(number):
            module = prefix + ("self_attn." if group in ("qkv", "o") else "mlp.")
            linear: Linear = getattr(layer, group)
            for kind, columns in (("weight", layout.input_index(group)), ("bias", None)):
                runs = layout.output_index(group)
                names = [f"{module}{part}.{kind}" for part, _ in runs]
                if kind == "bias" and not cfg.bias(group):
                    assert linear.bias is None
                    continue
                used.update(names)
                rows = [
                    take(stored[name], index, columns)
                    for name, (_, index) in zip(names, runs, strict=True)
                ]
                got = linear.weight.kernel if kind == "weight" else linear.bias
                assert got is not None
                np.testing.assert_array_equal(got[...], np.concatenate(rows).T)
    assert used == stored.keys()


def test_parameters_are_sharded_so_that_no_device_holds_another_ones_rows(tiny_model):
    model = load(tiny_model("llama"), tp=4)
    layer = model.layers[0]
    assert layer.gate_up is not None
    assert layer.down is not None
    for array, shard in (
        (model.embed, (80, 64)),
        (head(model), (64, 80)),
        (layer.qkv.weight.kernel, (64, 48)),
        (layer.o.weight.kernel, (16, 64)),
        (layer.gate_up.weight.kernel, (64, 48)),
        (layer.down.weight.kernel, (24, 64)),
    ):
        shards = jax.tree.leaves(array)[0].addressable_shards
        assert len({s.device for s in shards}) == 4
        assert [s.data.shape for s in shards] == [shard] * 4


@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_any_stored_type_loads_as_any_wanted_type(tiny_model, stored, wanted):
    folder = tiny_model("llama_odd", dtype=stored)
    model = load(folder, tp=2, dtype=wanted)
    source = load_file(folder / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert source.dtype == DTYPES[stored]
    down = model.layers[1].down
    assert down is not None
    kernel = down.weight.kernel[...]
    assert kernel.dtype == DTYPES[wanted]
    np.testing.assert_array_equal(kernel[:99], source.astype(DTYPES[wanted]).T)
    assert not np.asarray(kernel[99:]).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sharded_files_give_the_same_weights_as_one_file(tiny_model, dtype):
    one, three = (
        nnx.state(load(tiny_model("qwen2", shards=n, dtype=dtype), tp=2, dtype=dtype))
        for n in (1, 3)
    )
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), one, three)
    assert all(jax.tree.leaves(equal))


def test_a_tied_head_is_copied_only_if_asked(tiny_model):
    assert load(tiny_model("llama_tied"), copy_head=False).head is None
    assert load(tiny_model("llama"), copy_head=False).head is not None


def test_progress_ends_at_the_total(tiny_model):
    calls = []
    model = load(tiny_model("llama"), progress=lambda *call: calls.append(call))
    total = sum(array.nbytes for array in jax.tree.leaves(nnx.state(model)))
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1][1] == calls[-1][2] == total
    assert {name for name, _, _ in calls} >= {"embed", "layers.1.down.weight.kernel"}


@pytest.mark.parametrize("tp", [1, 2])
def test_dummy_weights_have_the_shapes_and_places_of_loaded_ones(tiny_model, tp):
    folder = tiny_model("qwen3")
    layout = Layout(ModelConfig.from_folder(folder), tp)
    dummy = dummy_weights(layout, make_mesh(tp), "bfloat16", seed=1)
    kind = lambda x: (x.shape, str(x.dtype), str(x.sharding))  # noqa: E731
    loaded = load(folder, tp, "bfloat16")
    assert jax.tree.map(kind, nnx.state(dummy)) == jax.tree.map(kind, nnx.state(loaded))
    other = dummy_weights(layout, make_mesh(tp), "bfloat16", seed=2)
    weights = [m.layers[i].o.weight.kernel[...] for m in (dummy, other) for i in range(2)]
    assert all(0.05 < float(jnp.std(w.astype(jnp.float32))) < 0.5 for w in weights)
    assert len({float(jnp.sum(w.astype(jnp.float32))) for w in weights}) == 4


# Broken folders: a copy of a good one, changed, must be refused with these words.


@pytest.fixture
def copy(tiny_model, tmp_path):
    def make(family="llama", **options):
        folder = tmp_path / f"{family}-copy"
        shutil.copytree(tiny_model(family, **options), folder)
        return folder

    return make


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder, tp=1, dtype="float32"):
    with pytest.raises(ModelError) as caught:
        load(folder, tp, dtype)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_extra_misshaped_and_integer_tensors_are_listed_in_one_error(copy):
    folder = copy()

    def edit(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
        tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((64, 64), np.float32)
        tensors["model.norm.weight"] = np.zeros((64,), np.int32)

    change(folder, edit)
    message = refusal(folder)
    for words in (
        "2 missing: ",
        "lm_head.weight",
        "model.layers.1.mlp.up_proj.weight",
        "2 not expected: ",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.k_proj.weight is [64, 64], expected [32, 64]",
        "model.norm.weight is I32",
    ):
        assert words in message


def test_a_long_list_is_cut_after_ten_names_and_says_how_many(copy):
    folder = copy()
    names = [f"extra.{n}.weight" for n in range(25)]
    change(folder, lambda t: t.update(dict.fromkeys(names, np.zeros(1, np.float32))))
    message = refusal(folder)
    assert "25 not expected" in message
    assert message.count("extra.") == 10
    assert "and 15 more" in message


def test_inv_freq_and_a_tied_models_head_are_harmless(copy):
    folder = copy("llama_tied")

    def edit(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
        tensors["lm_head.weight"] = np.full((320, 64), 7, np.float32)

    change(folder, edit)
    model = load(folder)
    np.testing.assert_array_equal(head(model), np.asarray(model.embed[...]).T)


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        "a\\b.safetensors",
        "model.bin",
        "model.safetensors\n",
        "\0.safetensors",
        3,
        None,
    ],
)
def test_weight_map_never_leaves_the_folder(copy, tmp_path, file):
    folder = copy(shards=2)
    shutil.copy(folder / "model-00001-of-00002.safetensors", tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.embed_tokens.weight"] = file
    index.write_text(json.dumps(data))
    assert "expected the plain name" in refusal(folder)


def test_an_index_that_lies_is_refused(copy):
    folder = copy(shards=2)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    for change_map, words in (
        ({"model.norm.weight": first}, "names tensors that are not there: model.norm.weight"),
        ({"model.other.weight": first}, "names tensors that are not there: model.other.weight"),
        ({"model.norm.weight": "gone.safetensors"}, "gone.safetensors is missing"),
    ):
        assert good["weight_map"]["model.norm.weight"] == second
        index.write_text(json.dumps({"weight_map": good["weight_map"] | change_map}))
        assert words in refusal(folder)
    for text in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'):
        index.write_text(text)
        assert "index.json" in refusal(folder)


def test_a_tensor_in_two_files_is_refused(copy):
    folder = copy()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_tensors(folder, tensors, shards=2)
    first, second = (folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    twice = next(iter(load_file(first)))
    save_file(load_file(second) | {twice: np.zeros(3, np.float32)}, second)
    assert f"{twice} is in model-00001-of-00002.safetensors and model-00002" in refusal(folder)


def test_files_that_are_not_there_or_broken_are_named(copy):
    folder = copy()
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"\xff" * 64):
        file.write_bytes(content)
        assert "model.safetensors is not a readable safetensors file" in refusal(folder)
    file.unlink()
    assert "has neither model.safetensors nor" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "convert them to safetensors" in refusal(folder)


def test_values_beyond_float16_are_refused_instead_of_becoming_infinite(copy):
    folder = copy()
    name = "model.layers.1.self_attn.o_proj.weight"
    change(folder, lambda tensors: tensors[name].__setitem__((63, 63), 1e5))
    assert name in refusal(folder, tp=2, dtype="float16")
    assert load(folder, tp=2, dtype="bfloat16") is not None
