"""The gated MLP's launch in Mosaic's interpreter against float64, its gradients, and what it refuses.

The interpreter has no grid-wide counters: it runs the stages of the launch one by one. tests/gpu runs
the one launch.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import testing
from kernels_pallas.act_mul import act_mul
from kernels_pallas.gated_mlp import gated_mlp, hopper
from kernels_pallas.gated_mlp.hopper_tuning import (
    Tuning,
    for_pages,
    shared_bytes,
    single_page,
    tuning,
)
from kernels_pallas.lora_matmul import RankPool, Segments, lora_matmul
from kernels_pallas.lora_matmul.hopper_tuning import SHARED_BYTES

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernel needs jax 0.11 (run .venv312)"
)
BLOCKS = 2  # the interpreter runs every warpgroup of every block as a thread


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of a gated MLP; pages that are not active hold NaN."""

    x: jax.Array
    gate_up: jax.Array
    down: jax.Array
    pools: tuple[RankPool, RankPool]
    segments: Segments

    @classmethod
    def random(
        cls, rows: testing.Rows, width: int, hidden: int, dtype: str = "bfloat16",
        bucket: int | None = None,
    ) -> "Case":  # fmt: skip
        rng, kind = np.random.default_rng(5), jnp.dtype(dtype)
        count, pages = len(rows.adapter), rows.pages + 4
        x, gate_up = testing.random_inputs(
            rng, rows=count, width=width, total=2 * hidden, dtype=kind
        )
        _, down = testing.random_inputs(rng, rows=1, width=hidden, total=width, dtype=kind)
        segs = testing.segments(rows, pool_pages=pages, bucket=bucket or rows.pages + 1)
        unused = np.setdiff1d(np.arange(1, pages), np.asarray(segs.pages))

        def pool(width: int, part_sizes: tuple[int, ...]) -> RankPool:
            made = testing.random_pool(
                rng, pages=pages, width=width, part_sizes=part_sizes, dtype=kind
            )
            return RankPool(a=made.a.at[unused].set(jnp.nan), b=made.b.at[unused].set(jnp.nan))

        pools = pool(width, (hidden, hidden)), pool(hidden, (width,))
        return cls(x=x, gate_up=gate_up, down=down, pools=pools, segments=segs)

    def exact(self, activation: str, *, lora: bool) -> tuple[np.ndarray, np.ndarray]:
        """Base and delta in float64. The hidden state is rounded, as the Semantics say."""
        hidden = self.down.shape[0]
        base, delta = testing.exact(
            self.x, self.gate_up, self.pools[0], self.segments, (hidden, hidden)
        )

        def rest(both: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            gate, up = np.split(both, 2, axis=1)
            if activation == "silu":
                gate = gate / (1 + np.exp(-gate))
            else:
                inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
                gate = gate * (1 + np.tanh(inner)) / 2
            h = jnp.asarray(gate * up, self.x.dtype)
            return testing.exact(h, self.down, self.pools[1], self.segments, self.down.shape[1:])

        plain = rest(base)[0]
        return plain, (sum(rest(base + delta)) - plain if lora else np.zeros_like(plain))


def small(t: Tuning, split: int) -> Tuning:
    """The same with less in flight, for the interpreter."""
    shrinks = {
        name: dataclasses.replace(getattr(t, name), slices=2) for name in ("gate_up", "down")
    }
    return dataclasses.replace(t, slots=4, split=split, shrink_stages=2, **shrinks)


@interpreted
@pytest.mark.parametrize(
    ("count", "hidden", "activation", "split"),
    [(13, 256, "silu", 2), (40, 128, "gelu_tanh", 1)],  # an expand step is one slot or two
)
def test_the_interpreted_launch_matches_float64_with_adapters(count, hidden, activation, split):
    rows = testing.pattern("uniform", count, rank=None, resident=4)
    rows.adapter[::5] = -1
    case = Case.random(rows, 128, hidden)
    config = small(tuning(-(-count // 8) * 8, 128, hidden, BLOCKS, lora=True), split)
    got = hopper.gated_mlp(
        case.x, case.gate_up, case.down, case.pools, case.segments, None,
        activation=activation, config=config, sms=BLOCKS, interpret=True,
    )  # fmt: skip
    assert got.shape == (split, count, 128)
    base, delta = case.exact(activation, lora=True)
    error = testing.delta_error(np.asarray(got).sum(0), base, delta)
    assert error < testing.tolerance(jnp.dtype("bfloat16"))


@interpreted
@pytest.mark.parametrize("count", [13, 40])
def test_the_interpreted_launch_for_a_single_page_matches_float64(count):
    rows = testing.pattern("uniform", count, rank=16, resident=1)
    rows.adapter[::5] = -1
    case = Case.random(rows, 256, 256, bucket=1)
    config = single_page(tuning(-(-count // 8) * 8, 256, 256, BLOCKS, lora=True))
    assert config.single
    config = dataclasses.replace(config, slots=4, split=2, shrink_stages=2)
    got = hopper.gated_mlp(
        case.x, case.gate_up, case.down, case.pools, case.segments, None,
        activation="silu", config=config, sms=BLOCKS, interpret=True,
    )  # fmt: skip
    base, delta = case.exact("silu", lora=True)
    error = testing.delta_error(np.asarray(got).sum(0), base, delta)
    assert error < testing.tolerance(jnp.dtype("bfloat16"))


@interpreted
def test_the_interpreted_launch_without_adapters_matches_float64():
    case = Case.random(testing.pattern("base", 9), 128, 384)
    got = hopper.gated_mlp(
        case.x, case.gate_up, case.down, None, None, jnp.arange(9),
        activation="silu", sms=3, interpret=True,
    )  # fmt: skip
    want, _ = case.exact("silu", lora=False)
    error = np.linalg.norm(np.asarray(got).sum(0) - want) / np.linalg.norm(want)
    assert error < testing.tolerance(jnp.dtype("bfloat16")) / 2


def test_gradients_are_those_of_the_three_steps(monkeypatch):
    rows = testing.pattern("uniform", 8, rank=None, resident=3)
    case = Case.random(rows, 128, 256)
    pools = tuple(
        RankPool(a=jnp.nan_to_num(pool.a), b=jnp.nan_to_num(pool.b)) for pool in case.pools
    )
    weight = jnp.linspace(-1, 1, 8 * 128).reshape(8, 128)

    def steps(x, gate_up, down, pools):
        both = lora_matmul(
            x, gate_up, pools[0], case.segments, part_sizes=(256, 256), implementation="xla",
            out_dtype=jnp.float32,
        )  # fmt: skip
        h = act_mul(both, activation="silu").astype(x.dtype)
        return lora_matmul(
            h, down, pools[1], case.segments, part_sizes=(128,), implementation="xla",
            out_dtype=jnp.float32,
        )[None]  # fmt: skip

    def launch(static, args):
        pools = RankPool(a=args["a1"], b=args["b1"]), RankPool(a=args["a2"], b=args["b2"])
        return jnp.concatenate([steps(args["x"], args["w1"], args["w2"], pools) / 4] * 4)

    monkeypatch.setattr(hopper, "_launch", launch)
    config = tuning(8, 128, 256, BLOCKS, lora=True)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))

    def ours(x, gate_up, down, pools):
        out = hopper.gated_mlp(
            x, gate_up, down, pools, case.segments, None,
            activation="silu", config=config, sms=BLOCKS,
        )  # fmt: skip
        assert out.shape[0] == 4
        return (out.sum(0) * weight).sum()

    args = (case.x, case.gate_up, case.down, pools)
    got = jax.grad(ours, argnums=(0, 1, 2, 3))(*args)
    want = jax.grad(lambda *args: (steps(*args)[0] * weight).sum(), argnums=(0, 1, 2, 3))(*args)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = (np.asarray(v.astype(jnp.float32)) for v in (g, w))
        assert np.linalg.norm(w) > 0
        assert np.linalg.norm(g - w) < 1e-2 * np.linalg.norm(w)


@pytest.mark.parametrize("rows", [8, 32, 64])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("width", "hidden"), [(4096, 14336), (4096, 12288), (5120, 27648), (256, 256)]
)
def test_tiles_of_real_models_fit_shared_memory(rows, lora, width, hidden):
    made = tuning(rows, width, hidden, 132, lora=lora)
    for own in (made, single_page(made)):
        assert shared_bytes(own, rows, lora) <= SHARED_BYTES
    assert made.rounds >= 2
    assert made.down.group == 2 * made.gate_up.group
    late, rest = divmod(hidden, 64 * made.rounds * made.split)
    assert rest == 0
    assert 0 < made.tail <= late


@pytest.mark.parametrize("pages", [8, 32, 64, 128])
def test_a_block_has_one_unit_of_either_shrink_when_half_of_the_room_is_taken(pages):
    most = tuning(32, 4096, 14336, 132, lora=True)
    made = for_pages(most, pages, 132)
    for own, before in ((made.gate_up, most.gate_up), (made.down, most.down)):
        groups = -(-pages // 2 // own.group)
        assert groups * own.slices <= 132
        assert own.slices == before.slices or groups * 2 * own.slices > 132, "fewer than that needs"


def test_an_ordinary_machine_takes_the_three_steps_instead():
    case = Case.random(testing.pattern("base", 8), 128, 256)
    args = (case.x, case.gate_up, case.down)
    assert gated_mlp(*args, activation="silu", rows=jnp.arange(8)) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "float32"}, "bfloat16 or float16"),
        ({"width": 192}, "multiples of 128"),
        ({"count": 65}, "65 rows: up to 64"),
    ],
)
@interpreted
def test_what_the_kernel_cannot_do_is_refused_by_name(change, said):
    options = {"count": 8, "width": 128, "dtype": "bfloat16"} | change
    rows = testing.pattern("base", options["count"])
    case = Case.random(rows, options["width"], 256, options["dtype"])
    with pytest.raises(NotImplementedError, match=said):
        hopper.gated_mlp(
            case.x, case.gate_up, case.down, None, None, jnp.arange(8), activation="silu", sms=4,
        )  # fmt: skip


def test_shapes_that_do_not_fit_each_other_are_refused():
    case = Case.random(testing.pattern("base", 8), 128, 256)
    with pytest.raises(ValueError, match=r"expected \[T, D\]"):
        gated_mlp(case.x, case.down, case.gate_up, activation="silu")


def test_pools_without_segments_are_refused_and_so_are_pools_of_another_shape():
    case = Case.random(testing.pattern("identical", 8), 128, 256)
    args = (case.x, case.gate_up, case.down)
    with pytest.raises(ValueError, match="adapters would be left out"):
        gated_mlp(*args, case.pools, None, activation="silu")
    with pytest.raises(ValueError, match="pool pages have shapes"):
        gated_mlp(*args, (case.pools[1], case.pools[0]), case.segments, activation="silu")


def test_an_unknown_implementation_is_refused():
    case = Case.random(testing.pattern("base", 8), 128, 256)
    with pytest.raises(NotImplementedError, match="'triton'"):
        gated_mlp(case.x, case.gate_up, case.down, activation="silu", implementation="triton")
