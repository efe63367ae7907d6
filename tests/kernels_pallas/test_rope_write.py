"""Rope and K/V write against transformers' rope, the Hopper kernel in Mosaic's interpreter, and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.rope_write import Norms, hopper, rope_write, xla

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernel needs jax 0.11 (run .venv312)"
)


OF_ROWS = Norms(q=jnp.ones((5, 1, 64)), k=jnp.ones((5, 1, 64)), eps=0.0, plus_one=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A step's arguments; token 2 is padding, and so is token 3: both go to page 0."""

    heads: int = 16
    kv_heads: int = 8
    width: int = 64
    turned: int = 64
    tokens: int = 5
    page: int = 8
    pages: int = 4
    dtype: type = jnp.bfloat16

    def args(self, odd: bool = False) -> list[jax.Array]:
        """qkv, cos, sin, pages, offsets, keys, values. `odd`: V of token 0 is not finite."""
        rng = np.random.default_rng(11)
        shape = (self.tokens, self.heads + 2 * self.kv_heads, self.width)
        pool = (self.pages, self.kv_heads, self.page, self.width)
        half = self.turned // 2
        angle = rng.integers(0, 99, self.tokens)[:, None] * 10.0 ** -(np.arange(half) / half * 4)
        assert self.tokens <= self.page * (self.pages - 1), "more tokens than places"
        place = rng.permutation(self.page * (self.pages - 1))[: self.tokens] + self.page
        place[2:4] = 0
        numbers = [jnp.asarray(rng.normal(size=s), self.dtype) for s in (shape, pool, pool)]
        turn = [jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)]
        where = [jnp.asarray(i, jnp.int32) for i in (place // self.page, place % self.page)]
        if odd:
            wild = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf], self.dtype)
            numbers[0] = numbers[0].at[0, -self.kv_heads :, :3].set(wild)
        return [numbers[0], *turn, *where, *numbers[1:]]

    def norms(self, plus_one: bool | None) -> Norms | None:
        """Weights that differ for q and k; None: none."""
        if plus_one is None:
            return None
        q, k = (jnp.linspace(a, 2, self.width).astype(self.dtype) for a in (0.5, 1))
        return Norms(q=q, k=k, eps=1e-3, plus_one=plus_one)

    @property
    def stored(self) -> np.ndarray:
        """Tokens whose K and V are theirs alone."""
        return np.array([t for t in range(self.tokens) if t not in (2, 3)])


def test_rotated_heads_equal_transformers_and_lie_in_their_pages():
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    step = Step(dtype=jnp.float32)
    qkv, cos, sin, pages, offsets, keys, values = step.args()
    q, new_keys, new_values = rope_write(qkv, cos, sin, pages, offsets, keys, values)
    wide = [torch.tensor(np.concatenate([x, x], axis=1))[None] for x in (cos, sin)]
    parts = torch.tensor(np.asarray(qkv)).split((16, 8, 8), dim=1)
    want = llama.apply_rotary_pos_emb(*(p.transpose(0, 1)[None] for p in parts[:2]), *wide)
    want_q, want_k = (w[0].transpose(0, 1).numpy() for w in want)
    np.testing.assert_allclose(q, want_q, rtol=1e-5, atol=1e-5)
    own = step.stored
    at = (np.asarray(pages)[own], slice(None), np.asarray(offsets)[own])
    np.testing.assert_allclose(np.asarray(new_keys)[at], want_k[own], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(new_values)[at], parts[2].numpy()[own])


def test_norms_of_heads_come_before_the_rotation():
    step = Step(dtype=jnp.float32)
    args = step.args()
    norms = Norms(q=jnp.full(64, 2.0), k=jnp.full(64, 3.0), eps=0.0, plus_one=False)
    q, keys, _ = rope_write(*args, norms=norms)
    sizes = np.linalg.norm(q, axis=-1)  # a rotation keeps them
    np.testing.assert_allclose(sizes, 2 * 64**0.5, rtol=1e-5)
    own = step.stored
    stored = np.asarray(keys)[np.asarray(args[3])[own], :, np.asarray(args[4])[own]]
    np.testing.assert_allclose(np.linalg.norm(stored, axis=-1), 3 * 64**0.5, rtol=1e-5)


def test_what_is_not_finite_is_stored_as_zero_in_v():
    step = Step(dtype=jnp.float32)
    args = step.args(odd=True)
    values = np.asarray(rope_write(*args)[2])
    stored = values[int(args[3][0]), :, int(args[4][0])]
    assert not stored[:, :3].any()
    assert stored[:, 3:].all()


@interpreted
@pytest.mark.parametrize(
    ("step", "plus_one"),
    [
        (Step(), None),
        (Step(heads=8, kv_heads=8), True),
        (Step(heads=16, kv_heads=16, width=128, turned=128), None),
        (Step(heads=4, kv_heads=2), None),
        (Step(heads=2, kv_heads=1, width=128, turned=128), False),
        (Step(kv_heads=4, width=256, turned=256), False),
    ],
)
def test_the_kernel_gives_what_the_plain_path_gives(step, plus_one):
    args = step.args(odd=True)
    got = hopper.rope_write(*args, norms=step.norms(plus_one), interpret=True)
    want = xla.rope_write(*args, norms=step.norms(plus_one))
    for ours, theirs, first in zip(got, want, (0, 1, 1), strict=True):
        ours, theirs = (np.asarray(x.astype(jnp.float32))[first:] for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=1 / 128, atol=1e-3)


@pytest.mark.parametrize(
    ("step", "norms", "said"),
    [
        (Step(dtype=jnp.float32), None, "must be bfloat16 or float16"),
        (Step(turned=32), None, "rope of 32 of 64"),
        (Step(heads=6, kv_heads=3), None, "6 heads and 3 kv heads of 64"),
        (Step(width=96, turned=96), None, "8 kv heads of 96"),
        (Step(), OF_ROWS, "norms of q and k"),
    ],
)
@interpreted
def test_what_the_kernel_cannot_do_is_refused_by_name(step, norms, said):
    with pytest.raises(NotImplementedError, match=said):
        rope_write(*step.args(), norms=norms, implementation="hopper")


def test_shapes_that_do_not_fit_each_other_are_refused():
    qkv, cos, sin, pages, offsets, keys, values = Step().args()
    with pytest.raises(ValueError, match=r"pages \(4,\)"):
        rope_write(qkv, cos, sin, pages[:4], offsets, keys, values)
    with pytest.raises(ValueError, match=r"qkv \(5, 31, 64\)"):
        rope_write(qkv[:, 1:], cos, sin, pages, offsets, keys[:, :-1], values)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(NotImplementedError, match="'triton'"):
        rope_write(*Step().args(), implementation="triton")
