"""Who may import whom: the table of jlora/README.md, checked against every import in the tree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

NO_JAX = [
    "errors",
    "shape",
    "cast",
    "options",
    "parts",
    "outputs",
    "stream",
    "tokenizer",
    "chat_template",
    "cli",
    "models.config",
    "models.config_file",
    "models.families",
    "models.rope",
    "models.checkpoint",
    "adapters.adapter",
    "adapters.peft",
    "adapters.store",
    "adapters.entry",
    "adapters.tiers",
    "adapters.lora_config",
    "adapters.pattern",
    "adapters.tensors",
    "engine.params",
    "engine.sequence",
    "engine.pages",
    "engine.scheduler",
    "engine.room",
    "engine.config",
    "engine.fill",
    "server.protocol",
    "server.metrics",
]

HOST = {"jlora.errors", "jlora.shape", "jlora.cast"}
ALLOWED = {
    "kernels_pallas": {"kernels_pallas"},
    "jlora.errors": set(),
    "jlora.shape": set(),
    "jlora.cast": {"jlora.errors"},
    "jlora.models.config": {"jlora.errors", "jlora.models"},
    "jlora.sharding": {"jlora.models.config", "jlora.errors"},
    "jlora.batch": {"jlora.shape", "kernels_pallas"},
    "jlora.quant": {"kernels_pallas"},
    "jlora.ops": {"kernels_pallas", "jlora.batch", "jlora.quant", "jlora.sharding"},
    "jlora.models": HOST
    | {"jlora.models", "jlora.ops", "jlora.batch", "jlora.quant", "jlora.sharding"}
    | {"kernels_pallas"},
    "jlora.adapters": HOST
    | {"jlora.adapters", "jlora.models.config", "jlora.sharding", "kernels_pallas"},
    "jlora.export": HOST
    | {"jlora.export", "jlora.models", "jlora.adapters", "jlora.sharding", "jlora.console"},
    "jlora.export.verify": {"jlora.llm", "jlora.options", "jlora.outputs", "jlora.engine.params"}
    | {"jlora.models.config", "jlora.adapters.adapter"},
    "jlora.inspection": HOST
    | {"jlora.inspection", "jlora.models", "jlora.adapters", "jlora.export"},
    "jlora.engine": HOST
    | {"jlora.engine", "jlora.models", "jlora.adapters", "jlora.batch", "jlora.sharding"}
    | {"jlora.device_memory"}
    | {"jlora.ops", "kernels_pallas"},  # types of a step's arrays, and the copy of active pages
    "jlora.server": {"jlora.server", "jlora.llm", "jlora.parts", "jlora.stream", "jlora.outputs"}
    | {"jlora.options", "jlora.tokenizer", "jlora.chat_template", "jlora.errors", "jlora"}
    | {"jlora.near"}
    | {"jlora.engine.params", "jlora.engine.sequence", "jlora.adapters.store"}
    | {"jlora.adapters.entry", "jlora.adapters.peft"},
}
"""Package or module -> prefixes of what it may import of this repository. The longest key counts."""

COMMANDS = {f"jlora.{name}" for name in ("serve", "generate", "bench", "merge", "inspect", "plan")}
"""`python -m` modules: they may import anything, nobody imports them."""


def modules():
    for top in ("jlora", "kernels_pallas"):
        for file in sorted((ROOT / top).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def imports(file):
    """Absolute names of this repository's modules, torch and peft that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"jlora.{a.name}" for a in node.names] if node.module == "jlora" else []
            names = names or [node.module or ""]
        else:
            continue
        yield from names


def covers(prefix, name):
    return name == prefix or name.startswith(prefix + ".")


def test_no_module_imports_what_the_house_plan_forbids():
    wrong = []
    for module, file in modules():
        keys = [key for key in ALLOWED if covers(key, module)]
        for name in imports(file):
            if name.split(".")[0] in ("torch", "peft"):
                wrong.append(f"{module} imports {name}")
            if name.split(".")[0] not in ("jlora", "kernels_pallas") or not keys:
                continue
            if not any(covers(prefix, name) for prefix in ALLOWED[max(keys, key=len)]):
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_nobody_imports_a_command():
    wrong = [
        f"{module} imports {name}"
        for module, file in modules()
        for name in imports(file)
        if name in COMMANDS
    ]
    assert wrong == []


def test_the_house_plan_names_every_module_without_jax():
    text = (ROOT / "jlora" / "README.md").read_text()
    named = re.search(r"No jax in: (.*?)\.\n", text, re.DOTALL)
    assert named is not None
    assert re.findall(r"[\w.]+", named[1]) == NO_JAX


@pytest.mark.parametrize("forbidden", ["jax", "torch"])
def test_host_modules_load_without(forbidden):
    """In one process: importing any of them must not bring the forbidden package in."""
    listed = ", ".join(f"jlora.{name}" for name in NO_JAX)
    code = f"import sys, {listed}; assert {forbidden!r} not in sys.modules, {forbidden!r}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_loads_without_torch_installed():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['peft'] = None\n"
        "import jlora, jlora.build, jlora.llm, jlora.server.app"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
