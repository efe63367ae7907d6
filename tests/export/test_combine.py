"""Combined deltas, module by module, against peft's add_weighted_adapter on the same adapters."""

import numpy as np
import pytest

from jlora.adapters.peft import read_adapter
from jlora.errors import AdapterError, ParameterError
from jlora.export import combine as combine_module
from jlora.export.combine import Recipe, chosen, combine, largest
from jlora.models.config import ModelConfig
from tests.tiny import make_adapter, make_model

WEIGHTS = [0.7, -0.4, 1.2]
EXACT = [
    Recipe(combination="cat"),
    Recipe(combination="linear"),
    Recipe(combination="svd"),
    Recipe(combination="svd", svd_rank=3),
    Recipe(combination="svd", svd_rank=24),
    Recipe(combination="ties", density=0.5),
    Recipe(combination="ties", density=0.3, majority="frequency"),
    Recipe(combination="ties_svd", density=0.6),
    Recipe(combination="ties_svd", density=1.0, majority="frequency", svd_rank=20),
    Recipe(combination="magnitude_prune", density=0.4),
    Recipe(combination="magnitude_prune_svd", density=0.25, svd_rank=5),
]
RANDOM = [
    Recipe(combination="dare_linear", density=0.5),
    Recipe(combination="dare_ties", density=0.7, seed=3),
    Recipe(combination="dare_linear_svd", density=0.4, svd_rank=12),
    Recipe(combination="dare_ties_svd", density=0.5, majority="frequency"),
]


def label(recipe: Recipe) -> str:
    return f"{recipe.combination}-{recipe.density}-{recipe.majority}-{recipe.svd_rank}"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("combine")
    model = make_model("llama", folder / "base")
    adapters = [
        make_adapter(model, folder / "a", r=8, alpha=12, seed=1),
        make_adapter(model, folder / "b", r=8, targets=["q_proj", "down_proj", "k_proj"], seed=2),
        make_adapter(
            model, folder / "c", r=8, alpha=3, alpha_pattern={"q_proj": 5.0}, layers=[0], seed=3
        ),
    ]
    return model, adapters


@pytest.fixture(scope="module")
def oracle(parts):
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model, adapters = parts
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    wrapped = peft.PeftModel.from_pretrained(base, adapters[0], adapter_name="0")
    for number, folder in enumerate(adapters[1:], start=1):
        wrapped.load_adapter(str(folder), adapter_name=str(number))
    return wrapped.eval()


def peft_deltas(model, recipe: Recipe, weights=WEIGHTS) -> dict:
    """(layer, projection) -> the delta of peft's combined adapter."""
    if "both" in model.peft_config:
        model.delete_adapter("both")
    model.add_weighted_adapter(
        [str(number) for number in range(len(weights))],
        weights,
        "both",
        combination_type=recipe.combination,
        density=recipe.density,
        majority_sign_method=recipe.majority or "total",
        svd_rank=recipe.svd_rank,
    )
    return {
        (int(name.split(".")[-3]), name.split(".")[-1]): module.get_delta_weight("both").numpy()
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def ours(parts, recipe: Recipe, weights=WEIGHTS) -> dict:
    model, folders = parts
    cfg = ModelConfig.from_folder(model)
    adapters = [read_adapter(folder, cfg) for folder in folders[: len(weights)]]
    pairs = {key: make() for key, make in combine(adapters, weights, recipe).items()}
    return {key: pair.b @ pair.a for key, pair in pairs.items()}


def same(got: dict, expected: dict, tolerance: float = 2e-5) -> None:
    assert got.keys() == expected.keys()
    for key, delta in expected.items():
        size = np.linalg.norm(delta)
        assert size > 0.01
        assert np.linalg.norm(got[key] - delta) < tolerance * size, key


@pytest.mark.parametrize("recipe", EXACT, ids=label)
def test_each_module_equals_pefts(parts, oracle, recipe):
    same(ours(parts, recipe), peft_deltas(oracle, recipe))


@pytest.mark.parametrize("recipe", RANDOM, ids=label)
def test_dare_equals_pefts_where_both_choose_the_same_values(parts, oracle, recipe, monkeypatch):
    """peft's torch.bernoulli is given the choice that ours made for the same tensor."""
    import torch
    from peft.utils import merge_utils

    made: list[tuple[np.ndarray, np.ndarray]] = []

    def recorded(task, density, rng):
        mask = chosen(task, density, rng)
        made.append((task, mask))
        return mask

    monkeypatch.setattr(combine_module, "chosen", recorded)
    got = ours(parts, recipe)
    shares = [mask.mean() for _, mask in made]
    assert abs(np.mean(shares) - recipe.density) < 0.02

    def same_choice(tensor, density, rescale):
        assert rescale
        value = tensor.detach().numpy()
        mask = next(
            mask
            for task, mask in made
            if task.shape == value.shape and np.allclose(task, value, rtol=1e-4, atol=1e-6)
        )
        return tensor * torch.from_numpy(mask.astype(np.float32)) / density

    monkeypatch.setattr(merge_utils, "random_pruning", same_choice)
    same(got, peft_deltas(oracle, recipe))


def test_dare_keeps_the_mean_of_many_choices_and_one_seed_makes_one_choice(parts):
    model, folders = parts
    cfg = ModelConfig.from_folder(model)
    adapters = [read_adapter(folder, cfg) for folder in folders[:2]]

    def delta(seed: int) -> np.ndarray:
        recipe = Recipe(combination="dare_linear_svd", density=0.5, svd_rank=64, seed=seed)
        pair = combine(adapters, [0.7, -0.4], recipe)[0, "q_proj"]()
        return pair.b @ pair.a

    pair = combine(adapters, [0.7, -0.4], Recipe())[0, "q_proj"]()
    plain = pair.b @ pair.a
    many = [delta(seed) for seed in range(40)]
    assert np.array_equal(many[3], delta(3))
    one = np.linalg.norm(many[0] - plain)
    assert one > 0.3 * np.linalg.norm(plain)
    # The error of a mean of n goes with 1/sqrt(n).
    assert np.linalg.norm(np.mean(many, axis=0) - plain) < 1.5 * one / np.sqrt(len(many))


def test_pruning_keeps_an_exact_count_and_the_first_of_equal_values():
    task = np.asarray([[1.0, -3.0, 2.0], [2.0, -2.0, 0.5]], np.float32)
    assert largest(task, 0.5).tolist() == [[False, True, True], [True, False, False]]
    assert largest(task, 0.1).sum() == 0
    assert largest(np.zeros((4, 4), np.float32), 0.5).sum() == 8


def test_a_single_adapter_is_pruned_and_cut_too_where_peft_takes_linear_without_a_word(
    parts, oracle
):
    recipe = Recipe(combination="magnitude_prune_svd", density=0.3, svd_rank=2)
    one = Recipe(combination="cat")
    key = (1, "v_proj")
    same(ours(parts, one, [0.7]), peft_deltas(oracle, recipe, [0.7]))
    got, whole = ours(parts, recipe, [0.7])[key], ours(parts, one, [0.7])[key]
    assert np.linalg.matrix_rank(got) == 2
    assert np.linalg.norm(got - whole) > 0.3 * np.linalg.norm(whole)


def test_rslora_is_counted_once_where_peft_scales_its_result_by_the_root_of_the_rank(
    tmp_path, parts
):
    """peft copies use_rslora into the new config whose alpha is its rank: its delta is sqrt(r) too large."""
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model, folders = parts
    rs = make_adapter(model, tmp_path / "rs", r=8, rslora=True, seed=5)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    wrapped = peft.PeftModel.from_pretrained(base, rs, adapter_name="0")
    wrapped.load_adapter(str(folders[0]), adapter_name="1")
    theirs = peft_deltas(wrapped, Recipe(combination="cat"), [0.5, 0.5])
    got = ours((model, [rs, folders[0]]), Recipe(combination="cat"), [0.5, 0.5])
    alone = [
        ours((model, [folder]), Recipe(combination="cat"), [1.0]) for folder in (rs, folders[0])
    ]
    same(got, {key: (alone[0][key] + alone[1][key]) / 2 for key in got})
    same({key: delta * 4 for key, delta in got.items()}, theirs)  # rank 16: the root is 4


@pytest.mark.parametrize(
    "combination", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
)
def test_joining_factors_needs_one_rank_and_svd_does_not(parts, tmp_path, combination):
    model, folders = parts
    other = make_adapter(model, tmp_path / "r4", r=4, seed=3)
    mixed = (model, [folders[0], other])
    density = None if combination == "linear" else 0.5
    with pytest.raises(AdapterError, match=r"ranks \[4, 8\]"):
        ours(mixed, Recipe(combination=combination, density=density), [1, 1])
    assert ours(mixed, Recipe(combination="svd"), [1, 1])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"combination": "ties"}, "needs --density"),
        ({"combination": "dare_linear_svd", "density": 0.0}, "above 0"),
        ({"combination": "ties", "density": 1.5}, "at most 1"),
        ({"combination": "ties", "density": float("nan")}, "at most 1"),
        ({"combination": "cat", "density": 0.5}, "keeps all values"),
        ({"combination": "linear", "svd_rank": 4}, "no SVD"),
        ({"combination": "svd", "svd_rank": 0}, "at least 1"),
        ({"combination": "dare_linear", "density": 0.5, "majority": "total"}, "elects no signs"),
    ],
)
def test_a_setting_that_is_missing_or_would_do_nothing_is_refused(fields, reason):
    with pytest.raises(ParameterError, match=reason):
        Recipe(**fields)
