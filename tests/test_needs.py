"""What rank pages hold: the projections that were asked for, or those of the adapters of the start."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora.adapters.adapter import EVERY
from jlora.adapters.groups import page_bytes
from jlora.adapters.peft import read_adapter
from jlora.adapters.pool import RankPages
from jlora.errors import AdapterError, ParameterError
from jlora.models.config import ModelConfig
from jlora.needs import needs
from jlora.options import LoraModule, ModelOptions, ServeOptions
from jlora.sharding import Layout, make_mesh
from tests import tiny
from tests.adapters.folders import config, tensors, write

CFG = ModelConfig.from_dict(tiny.model_config("llama"))
FUSED = ModelConfig.from_dict(tiny.model_config("phi3"))


def folder(root: Path, *targets: str) -> Path:
    return write(
        root, config(r=8, target_modules=list(targets)), tensors(list(targets), 8, cfg=CFG)
    )


def targets(options: ModelOptions, *paths: Path, cfg: ModelConfig = CFG) -> frozenset[str]:
    modules = [LoraModule(name=f"a{n}", path=str(path)) for n, path in enumerate(paths)]
    return needs(options, cfg, modules).targets


def test_a_server_that_takes_no_further_adapters_holds_what_those_of_its_start_change(
    tmp_path: Path,
) -> None:
    one, two = folder(tmp_path / "1", "q_proj", "v_proj"), folder(tmp_path / "2", "down_proj")
    assert targets(ServeOptions(), one) == {"qkv"}
    assert targets(ServeOptions(), one, two) == {"qkv", "down"}


def test_an_engine_that_may_get_others_holds_every_projection(tmp_path: Path) -> None:
    one = folder(tmp_path / "1", "q_proj")
    assert targets(ServeOptions(lora_dir=(str(tmp_path),)), one) == EVERY
    assert targets(ModelOptions(), one) == EVERY
    assert targets(ServeOptions()) == EVERY


@pytest.mark.parametrize(
    ("cfg", "names", "expected"),
    [
        (CFG, ("q_proj", "v_proj"), {"qkv"}),
        (CFG, ("up_proj", "o_proj"), {"gate_up", "o"}),
        (CFG, ("all",), EVERY),
        (CFG, ("all-linear",), EVERY),
        (FUSED, ("qkv_proj", "gate_up_proj"), {"qkv", "gate_up"}),
    ],
)
def test_lora_target_modules_name_projections(cfg: ModelConfig, names: Any, expected: Any) -> None:
    assert targets(ModelOptions(lora_target_modules=names), cfg=cfg) == expected


@pytest.mark.parametrize("name", ["q", "lm_head", "qkv_proj", ""])
def test_a_name_that_is_no_projection_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(ParameterError, match=r"is not a projection of .* it has q_proj, k_proj"):
        targets(ModelOptions(lora_target_modules=("q_proj", name)))


@pytest.mark.parametrize("tp", [1, 2])
def test_pages_of_fewer_projections_are_smaller_and_refuse_adapters_of_others(
    tmp_path: Path, tp: int
) -> None:
    layout = Layout(CFG, tp)
    own = frozenset({"qkv"})
    pages = RankPages(CFG, layout, make_mesh(tp), 2, np.float32, targets=own)
    assert [list(groups) for groups in pages.pools] == [["qkv"]] * CFG.layers
    every, few = page_bytes(layout, np.float32), page_bytes(layout, np.float32, targets=own)
    assert pages.bytes_per_page == few < every / 2
    pages.write(pages.stage(read_adapter(folder(tmp_path / "1", "k_proj"), CFG)), [2])
    with pytest.raises(
        AdapterError, match=r"changes o_proj, up_proj, for which .* in --lora-target-modules too"
    ):
        pages.stage(read_adapter(folder(tmp_path / "2", "q_proj", "o_proj", "up_proj"), CFG))
