"""Meshes of 1, 2 and 4: the same log-probabilities on a CPU, and the speed of two GPUs."""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from experiments.common import ROOT, Experiment, environment
from experiments.show import plot_ratios
from jlora.benchmark.results import Group
from jlora.benchmark.shapes import SHAPES

HERE = Path(__file__).parent
MESHES = {"smoke": (1, 2), "cpu": (1, 2, 4), "h200x2": (1, 2)}
RANDOM: dict[str, dict[str, Any]] = {
    "smoke": SHAPES["tiny"],
    "h200x2": SHAPES["llama-3.2-1b"] | {"num_hidden_layers": 2, "vocab_size": 4096},
}
"""config.json of the models of scales that do not take the embedded one."""
DTYPES: dict[str, Literal["float32", "bfloat16"]] = {"h200x2": "bfloat16"}
TOLERANCES = {"float32": 2e-3, "bfloat16": 0.1}
"""Nats; sums in another order, and in bfloat16 rounded before devices add theirs."""

FOLLOW = 12
"""Tokens that follow the prompt, greedily: decode rows."""

TEXT = "The capital of France is Paris. Ahoy, the sea is wide and the ship sails to the west."


def score(mesh: int, scale: str) -> None:
    """In a process of its own: prints log-probabilities of a prompt, and of the tokens that follow it,
    by model, as JSON."""
    from jlora.console import prepare_devices

    prepare_devices(mesh)
    from jlora.benchmark.adapters import write_random_adapters
    from jlora.benchmark.shapes import write_shape
    from jlora.engine.params import SamplingParams
    from jlora.llm import LLM
    from jlora.models.config import ModelConfig
    from jlora.options import ModelOptions

    small: dict[str, Any] = {"max_num_seqs": 1, "max_model_len": 64, "max_num_batched_tokens": 32}
    with tempfile.TemporaryDirectory() as root:
        if scale in RANDOM:
            folder = write_shape("tiny", root)
            (folder / "config.json").write_text(json.dumps(RANDOM[scale]))
            made = write_random_adapters(
                f"{root}/adapters", ModelConfig.from_folder(folder), [8, 24]
            )
            small |= {"model": str(random_checkpoint(folder))}
            small |= {"lora_modules": tuple(f"{name}={path}" for name, path in made.items())}
        dtype = DTYPES.get(scale, "float32")
        llm = LLM.load(ModelOptions(mesh=mesh, max_loras=1, dtype=dtype, **small))
        with llm:
            prompt = [t % llm.parts.vocab for t in llm.tokenizer.encode(TEXT)][:48]
            found = {}
            for name in (llm.names[0], *(str(a["name"]) for a in llm.store.adapters())):
                params = SamplingParams(
                    max_tokens=FOLLOW,
                    temperature=0.0,
                    logprobs=0,
                    prompt_logprobs=0,
                    ignore_eos=True,
                )
                stream = llm.stream([prompt], params, adapter=llm.resolve(name))
                for _ in stream:
                    pass
                stream.close()
                choice = stream.choices[0]
                found[name] = {
                    "prompt": [own.logprob for own in choice.prompt_logprobs or [] if own],
                    "tokens": [own.token for own in choice.logprobs],
                    "generated": [own.logprob for own in choice.logprobs],
                }
    print(json.dumps(found))


def random_checkpoint(folder: Path) -> Path:
    """Weights for a folder without any. Not --load-format dummy, which draws by shard."""
    import numpy as np
    from safetensors.numpy import save_file

    from jlora.models.config import ModelConfig
    from jlora.models.weights import sources, tensor_shapes
    from jlora.sharding import Layout

    cfg, rng = ModelConfig.from_folder(folder), np.random.default_rng(0)
    shapes = tensor_shapes(cfg, sources(cfg, Layout(cfg, 1)))
    tensors = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def agree(scale: str, out: Path) -> int:
    """Writes a file beside the results; 1 if meshes differ by more than the tolerance."""
    if scale not in MESHES:
        return 0
    tolerance = TOLERANCES[DTYPES.get(scale, "float32")]
    by_mesh: dict[int, dict[str, Any]] = {}
    for mesh in MESHES[scale]:
        command = [sys.executable, __file__, "--score", str(mesh), scale]
        print("+", *command, flush=True)
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, check=True
        )
        by_mesh[mesh] = json.loads(done.stdout.splitlines()[-1])
    one = by_mesh[1]
    base = next(iter(one))
    rows = [
        {
            "model": name,
            "mesh": mesh,
            "difference": difference(one[name]["prompt"], found[name]["prompt"]),
            "effect": difference(one[base]["prompt"], found[name]["prompt"]),
            **following(one[name], found[name]),
        }
        for mesh, found in by_mesh.items()
        for name in found
    ]
    for row in rows:
        print(row)
    out.with_name(f"{out.stem}_parity.json").write_text(json.dumps(rows, indent=1) + "\n")
    largest = max(max(row["difference"], row["generated"]) for row in rows)
    return int(largest > tolerance)


def difference(one: list[float], other: list[float]) -> float:
    """The largest of all tokens."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def following(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """How many tokens after the prompt are the same, and the largest difference of theirs."""
    pairs = list(zip(one["tokens"], other["tokens"], strict=True))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    largest = difference(one["generated"][:same], other["generated"][:same]) if same else math.inf
    return {"generated": largest, "same_tokens": same}


def plot(figure: Any, groups: list[Group]) -> None:
    """Speed by mesh."""
    rows = [row for group in groups for row in group.rows]
    labels = [
        f"tp {g.session['workload']['mesh']}\n{row['case']}" for g in groups for row in g.rows
    ]
    plot_ratios(figure, rows, labels, "each against base on the same mesh")


EXPERIMENT = Experiment(
    folder=HERE, plot=plot, variants=(("--mesh", "1"), ("--mesh", "2")), before=agree
)

if __name__ == "__main__":
    if sys.argv[1:2] == ["--score"]:
        score(int(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(EXPERIMENT.main())
