"""Meshes of 1, 2 and 4: the same log-probabilities on a CPU, and the speed of two GPUs."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.common import ROOT, Experiment, environment
from experiments.show import plot_ratios
from jlora.benchmark.results import Group

HERE = Path(__file__).parent
MESHES = {"smoke": (1, 2), "cpu": (1, 2, 4)}
TOLERANCE = 2e-3
"""Nats; float32 sums in another order."""

TEXT = "The capital of France is Paris. Ahoy, the sea is wide and the ship sails to the west."


def score(mesh: int, scale: str) -> None:
    """In a process of its own: prints log-probabilities of a prompt by model, as JSON."""
    from jlora.console import prepare_devices

    prepare_devices(mesh)
    from jlora.benchmark.adapters import write_random_adapters
    from jlora.benchmark.shapes import shape_config, write_shape
    from jlora.engine.params import SamplingParams
    from jlora.llm import LLM
    from jlora.options import ModelOptions

    small: dict[str, Any] = {"max_num_seqs": 1, "max_model_len": 64, "max_num_batched_tokens": 32}
    with tempfile.TemporaryDirectory() as root:
        if scale == "smoke":
            made = write_random_adapters(f"{root}/adapters", shape_config("tiny"), [8, 24])
            small |= {"model": str(random_checkpoint(write_shape("tiny", root)))}
            small |= {"lora_modules": tuple(f"{name}={path}" for name, path in made.items())}
        llm = LLM.load(ModelOptions(mesh=mesh, max_loras=1, dtype="float32", **small))
        with llm:
            prompt = [t % llm.parts.vocab for t in llm.tokenizer.encode(TEXT)][:48]
            found = {}
            for name in (llm.names[0], *(str(a["name"]) for a in llm.store.adapters())):
                params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
                stream = llm.stream([prompt], params, adapter=llm.resolve(name))
                for _ in stream:
                    pass
                stream.close()
                scores = stream.choices[0].prompt_logprobs or []
                found[name] = [entry.logprob for entry in scores if entry is not None]
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
    by_mesh: dict[int, dict[str, list[float]]] = {}
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
            "difference": max(abs(a - b) for a, b in zip(one[name], found[name], strict=True)),
            "effect": max(abs(a - b) for a, b in zip(one[base], found[name], strict=True)),
        }
        for mesh, found in by_mesh.items()
        for name in found
    ]
    for row in rows:
        print(row)
    out.with_name(f"{out.stem}_parity.json").write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["difference"] > TOLERANCE for row in rows))


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
