"""Peak memory of loading a 2 GB random checkpoint: the sharded model plus one tensor, or more?

`python experiments/009_load_memory/run.py [--keep]` writes the checkpoint into a temporary folder,
loads it in one fresh process per case, prints a table and a line of JSON, and deletes the folder.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 14,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
FILES = 4
CASES = [("bfloat16", 1), ("bfloat16", 2), ("float32", 1)]


def memory() -> dict[str, int]:
    """Bytes of VmHWM (peak RSS), VmRSS, RssAnon and RssFile of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    table = dict(line.split(":", 1) for line in lines)
    return {k: int(table[k].split()[0]) * 1024 for k in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}


def write(folder: Path) -> int:
    """Writes the checkpoint file by file; returns its bytes."""
    from jlora.models.config import ModelConfig
    from jlora.models.weights import sources, tensor_shapes
    from jlora.sharding import Layout

    (folder / "config.json").write_text(json.dumps(CONFIG))
    cfg = ModelConfig.from_folder(folder)
    shapes = tensor_shapes(cfg, sources(cfg, Layout(cfg, 1)))
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(1_000_003) * 0.02).astype(ml_dtypes.bfloat16)
    names, weight_map, total = list(shapes), {}, 0
    for number in range(FILES):
        file = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        tensors = {name: np.resize(noise, shapes[name]) for name in names[number::FILES]}
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def load(folder: Path, dtype: str, mesh: int) -> None:
    """Loads in this process and prints a line of JSON."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={mesh}"
    import jax
    from flax import nnx

    from jlora.models.config import ModelConfig
    from jlora.models.weights import load_weights
    from jlora.sharding import Layout, make_mesh

    layout = Layout(ModelConfig.from_folder(folder), mesh)
    devices = make_mesh(mesh)
    jax.block_until_ready(jax.device_put(np.zeros(8), jax.devices()[0]))
    before, peak_anon, done = memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak_anon
        while not done.wait(0.001):
            peak_anon = max(peak_anon, memory()["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = load_weights(folder, layout, devices, dtype)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    arrays = jax.tree.leaves(nnx.state(model))
    result = {
        "dtype": dtype,
        "mesh": mesh,
        "model": sum(array.nbytes for array in arrays),
        "largest_tensor": max(array.nbytes for array in arrays),
        "peak_rss_over_start": memory()["VmHWM"] - before["VmRSS"],
        "peak_anon_over_start": peak_anon - before["RssAnon"],
        "seconds": round(seconds, 2),
    }
    print(json.dumps(result))


def main() -> None:
    """The parent: writes, runs the cases, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="do not delete the checkpoint")
    parser.add_argument("--load", nargs=3, metavar=("FOLDER", "DTYPE", "MESH"), help="one case")
    args = parser.parse_args()
    if args.load:
        load(Path(args.load[0]), args.load[1], int(args.load[2]))
        return
    folder = Path(tempfile.mkdtemp(prefix="jlora-load-memory-"))
    try:
        print(f"checkpoint: {write(folder) / 1e9:.2f} GB in {FILES} files, {folder}")
        print("dtype     mesh  model MB  largest tensor MB  peak RSS MB  peak anon MB  seconds")
        results = []
        for dtype, mesh in CASES:
            command = [sys.executable, __file__, "--load", str(folder), dtype, str(mesh)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            r = json.loads(out.splitlines()[-1])
            results.append(r)
            print(
                f"{dtype:9} {mesh:4} {r['model'] / 1e6:9.0f} {r['largest_tensor'] / 1e6:18.0f} "
                f"{r['peak_rss_over_start'] / 1e6:12.0f} {r['peak_anon_over_start'] / 1e6:13.0f} "
                f"{r['seconds']:8.1f}"
            )
        print(json.dumps({"python": platform.python_version(), "cases": results}))
    finally:
        if not args.keep:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()


if __name__ == "__main__":
    main()
