"""What `python -m jlora.merge` does when it is stopped, refused or given odd bases: nothing is left."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest

from jlora import merge
from jlora.export import folder as folder_module
from tests.tiny import make_adapter, make_model


@pytest.fixture
def parts(tmp_path):
    model = make_model("llama", tmp_path / "base")
    return model, make_adapter(model, tmp_path / "a")


def argv(model, *adapters, output):
    return [
        *("--model", str(model), "--output", str(output)),
        *("--adapters", *map(str, adapters)),
    ]


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        merge.main([str(a) for a in arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    (line,) = (line for line in error.splitlines() if "━" not in line)  # a progress bar's
    return line


SLOWLY = """
import sys, time
from jlora import merge
from jlora.export import checkpoint
block = checkpoint._block
checkpoint._block = lambda *args: (time.sleep(1), block(*args))[1]
sys.exit(merge.main(sys.argv[1:]))
"""
"""jlora.merge at a second a tensor: it cannot end before the signal comes."""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_stopped_leaves_nothing(parts, tmp_path, stop):
    before = set(tmp_path.iterdir())
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *argv(*parts, output=tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
    )
    while set(tmp_path.iterdir()) == before:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(stop)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert set(tmp_path.iterdir()) == before


def test_a_full_disk_is_one_line_and_leaves_nothing(parts, tmp_path):
    model, adapter = parts
    before = set(tmp_path.iterdir())
    limited = ["sh", "-c", 'ulimit -f 200; exec "$@"', "sh"]  # blocks of 512 bytes
    command = [sys.executable, "-m", "jlora.merge", *argv(model, adapter, output=tmp_path / "out")]
    done = subprocess.run([*limited, *command], capture_output=True, text=True)
    assert done.returncode == 2
    assert "out cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert set(tmp_path.iterdir()) == before


def test_too_little_free_space_is_refused_before_the_work(parts, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    error = refused(capsys, *argv(*parts, output=tmp_path / "out"))
    assert "the disk has 1000 B free" in error
    assert not (tmp_path / "out").exists()


def test_an_output_below_a_file_is_one_line(parts, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in refused(capsys, *argv(*parts, output=tmp_path / "file" / "out"))


def test_an_output_that_appears_meanwhile_is_not_replaced(parts, tmp_path, capsys, monkeypatch):
    original = shutil.copyfile

    def appears(source, target):
        (tmp_path / "out").mkdir(exist_ok=True)  # empty: rename alone would take its place
        return original(source, target)

    monkeypatch.setattr(shutil, "copyfile", appears)
    assert "exists" in refused(capsys, *argv(*parts, output=tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
    assert not [f for f in os.listdir(tmp_path) if "partial" in f]


@pytest.mark.parametrize("method", ["bitsandbytes", "awq", "gptq"])
@pytest.mark.parametrize("way", ["merge", "extract"])
def test_a_quantised_base_is_refused_with_what_to_do_instead(parts, tmp_path, capsys, method, way):
    model, adapter = parts
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (model / "config.json").write_text(json.dumps(config))
    flags = {
        "merge": argv(model, adapter, output=tmp_path / "out"),
        "extract": ["--extract", model, model, "--output", tmp_path / "out"],
    }[way]
    error = refused(capsys, *flags)
    assert f"quantised (quant_method '{method}')" in error
    assert "merge into the float16 or bfloat16 checkpoint" in error


def test_an_adapter_for_another_base_is_refused_by_shape(parts, tmp_path, capsys):
    other = make_model("llama_odd", tmp_path / "other")
    error = refused(capsys, *argv(other, parts[1], output=tmp_path / "out"))
    assert "was this adapter trained on another base model?" in error
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_the_same_shapes_but_another_name_is_merged_with_a_note(
    parts, tmp_path, capsys
):
    model, adapter = parts
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "org/other-7b"})
    )
    assert merge.main(argv(model, adapter, output=tmp_path / "out")) == 0
    assert "says it was trained on org/other-7b, not on base" in capsys.readouterr().err


def test_joined_adapters_are_written_as_an_adapter_that_merges_to_the_same(parts, tmp_path):
    import numpy as np
    from safetensors.numpy import load_file

    model, a = parts
    b = make_adapter(model, tmp_path / "b", r=4, targets=["q_proj"], layers=[0], seed=4)
    recipe = ["--combination-type", "svd", "--svd-rank", "6", "--weights", "0.5", "2"]
    out, joined, again = (tmp_path / name for name in ("out", "joined", "again"))
    command = argv(model, a, b, output=out)
    assert merge.main([*command, *recipe, "--output-adapter", str(joined)]) == 0
    assert merge.main(argv(model, joined, output=again)) == 0
    config = json.loads((joined / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (6, str(model))
    base, first, second = (load_file(f / "model.safetensors") for f in (model, out, again))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert np.abs(first[name] - base[name]).max() > 0.1
    for name in first:
        np.testing.assert_allclose(first[name], second[name], atol=1e-5)


def test_output_adapter_alone_writes_no_checkpoint(parts, tmp_path, capsys):
    model, a = parts
    flags = ["--model", str(model), "--adapters", str(a), "--output-adapter"]
    assert merge.main([*flags, str(tmp_path / "one")]) == 0
    assert sorted(f.name for f in (tmp_path / "one").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert "--verify needs --output" in refused(capsys, *flags, tmp_path / "two", "--verify")
    assert "exists" in refused(capsys, *flags, tmp_path / "one")


def test_one_template_of_the_adapters_is_taken_and_two_are_a_note(parts, tmp_path, capsys):
    model, a = parts
    b = make_adapter(model, tmp_path / "b", seed=4)
    (a / "chat_template.jinja").write_text("{{ 'a' }}")
    assert merge.main(argv(model, a, b, output=tmp_path / "one")) == 0
    assert (tmp_path / "one" / "chat_template.jinja").read_text() == "{{ 'a' }}"
    (b / "chat_template.jinja").write_text("{{ 'b' }}")
    assert merge.main(argv(model, a, b, output=tmp_path / "two")) == 0
    assert "different chat templates" in capsys.readouterr().err
    assert not (tmp_path / "two" / "chat_template.jinja").exists()
