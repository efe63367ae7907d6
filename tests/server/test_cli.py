"""Flags, config files and help texts come from the dataclasses and agree with them."""

import dataclasses
import importlib
import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from jlora.cli import build_parser, field_docs, parse
from jlora.errors import ParameterError
from jlora.generate import GenerateOptions
from jlora.llm import LLM
from jlora.options import (
    LoraModule,
    ModelOptions,
    ServeOptions,
    parse_bytes,
    parse_lora_module,
    parse_pages,
)
from jlora.serve import welcome
from jlora.tokenizer import Tokenizer
from tests.server.fakes import fake_llm

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "serve").glob("*.toml"))


def refused(argv: list[str], cls: type = ServeOptions) -> str:
    """The one line on stderr with which a command line is refused."""
    error = io.StringIO()
    with redirect_stderr(error), pytest.raises(SystemExit) as caught:
        parse(cls, argv, prog="jlora.serve", accepted=("--enable-lora",))
    assert caught.value.code == 2
    line = error.getvalue()
    assert line.startswith("jlora.serve: error: ")
    assert line.count("\n") == 1, line
    return line


def test_without_flags_every_field_has_its_default():
    assert parse(ServeOptions, []) == ServeOptions()


def test_vllms_command_line_is_understood(tmp_path: Path):
    got = parse(
        ServeOptions,
        [
            "--model", "m", "--served-model-name", "a", "b", "--enable-lora",
            "--lora-modules", "x=/x", '{"name": "y", "path": "/y", "base_model_name": "a"}',
            "--max-loras", "4", "--max-cpu-loras", "9", "--max-model-len", "512",
            "--max-num-seqs", "16", "--max-num-batched-tokens", "64", "--gpu-memory-utilization",
            "0.5", "--dtype", "bfloat16", "--api-key", "k1", "k2", "--host", "::1", "--port", "0",
            "--max-logprobs", "5", "--mesh", "2", "--lora-dir", str(tmp_path),
            "--no-enable-prefix-caching", "--tensor-parallel-size", "3",
        ],
        accepted=("--enable-lora",),
    )  # fmt: skip
    assert got.served_model_name == ("a", "b")
    assert got.adapters == (
        LoraModule(name="x", path="/x"),
        LoraModule(name="y", path="/y", base_model_name="a"),
    )
    assert (got.max_loras, got.max_cpu_loras, got.port, got.mesh) == (4, 9, 0, 3)
    assert (got.gpu_memory_utilization, got.dtype, got.api_key) == (0.5, "bfloat16", ("k1", "k2"))
    assert got.enable_prefix_caching is False


def test_sglangs_aliases_mean_the_same():
    got = parse(
        ServeOptions,
        ["--lora-paths", "a=/a", "--lora-modules", "b=/b", "--lora-paths", "/dir/c",
         "--max-loras-per-batch", "3"],
    )  # fmt: skip
    assert got.lora_modules == ("a=/a", "b=/b", "/dir/c")
    assert [module.name for module in got.adapters] == ["a", "b", "c"]
    assert got.max_loras == 3


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--nonsense"], "--nonsense"),
        (["--max-lora", "3"], "--max-lora"),
        (["--port", "x"], "--port"),
        (["--port", "70000"], "port"),
        (["--dtype", "int4"], "int4"),
        (["--mesh", "0"], "mesh"),
        (["--max-loras", "8", "--max-cpu-loras", "2"], "max_cpu_loras"),
        (["--gpu-memory-utilization", "1.5"], "gpu_memory_utilization"),
        (["--lora-memory", "much"], "much"),
        (["--lora-memory", "0pages"], "at least 1 page"),
        (["--kv-cache-memory", "3pages"], "3pages"),
        (["--lora-modules", "=x"], "NAME=PATH"),
        (["--lora-modules", "{]"], "JSON"),
        (["--lora-modules", '{"name": "a"}'], "path"),
        (["--lora-modules", '{"name": "a", "path": "b", "evil": 1}'], "evil"),
        (["--lora-modules", "a=x", "a=y"], "more than once"),
        (["--lora-dir", "/does/not/exist"], "/does/not/exist"),
        (["--api-key", ""], "api_key"),
        (["--shutdown-timeout", "inf"], "shutdown_timeout"),
        (["--shutdown-timeout", "nan"], "shutdown_timeout"),
        (["--config", "/does/not/exist"], "/does/not/exist"),
        (["positional"], "positional"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv: list[str], words: str):
    assert words in refused(argv)


@pytest.mark.parametrize(
    ("command", "flag", "meant"),
    [
        ("serve", "--max-lora", "--max-loras"),
        ("serve", "--max_loras", "--max-loras?"),
        ("serve", "--prt=3", "--port?"),
        ("serve", "-model", "--model?"),
        ("serve", "--tensor-paralel-size", "--tensor-parallel-size?"),
        ("serve", "--no-enable-prefix-cache", "--no-enable-prefix-caching"),
        ("generate", "--temp", "--temperature?"),
        ("bench", "--concurency", "--concurrency?"),
        ("merge", "--ouput", "--output?"),
        ("plan", "--adaptors", "--adapters?"),
        ("inspect", "--modle", "--model?"),
        ("inspect", "--quux", "python -m jlora.inspect --help"),
    ],
)
def test_an_unknown_flag_of_any_command_is_answered_with_the_nearest_ones(
    command: str, flag: str, meant: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"jlora.{command}").main([flag, "4"])
    assert caught.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(f"jlora.{command}: error: unknown flag {flag.partition('=')[0]}: ")
    assert meant in line
    assert line.count("\n") == 1


def test_every_unknown_flag_is_named_and_a_stray_word_is_no_flag():
    line = refused(["--prt", "1", "--max-lora", "2"])
    assert "--prt: did you mean --port?" in line
    assert "--max-lora: did you mean --max-loras" in line
    assert "unexpected argument 'word'" in refused(["--port", "1", "word"])


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--max-lora-rank", "any rank"),
        ("--lora-dtype", "--dtype"),
        ("--trust-remote-code", "never run"),
        ("--enable-chunked-prefill", "--max-num-batched-tokens"),
    ],
)
def test_a_flag_of_vllms_that_is_not_needed_says_why(tmp_path: Path, flag: str, why: str):
    assert why in refused([flag, "64"])
    key = flag.removeprefix("--")
    options: dict[str, Any] = {key.replace("-", "_"): 64}
    assert why in refused(write(tmp_path, f"{key} = 64"))
    with pytest.raises(ParameterError, match=why):
        LLM("folder", **options)


def test_a_model_in_the_place_where_vllm_has_it_is_told_where_it_goes():
    assert "write --model ./llama" in refused(["./llama", "--port", "1"])


@pytest.mark.parametrize(
    ("param", "argv"),
    [
        ("merge", ["--merge", "nope"]),
        ("merge", ["--model", "m", "--lora-modules", "a=/a", "--merge", "shout"]),
        ("lora", ["hello", "--lora", "nope"]),
    ],
)
def test_an_adapter_that_is_not_there_is_told_before_the_model_is_loaded(
    param: str, argv: list[str]
):
    line = refused(argv, GenerateOptions if param == "lora" else ServeOptions)
    assert f"{param}: no adapter is named" in line
    assert ("a" if "--model" in argv else "shout, json, pirate") in line.rpartition(":")[2]


@pytest.mark.parametrize("name", ["shout", "SmolLM2-135M-Instruct:json", "shout*0.5+json*0.5", "a"])
def test_adapters_of_the_start_may_be_named_as_in_requests(name: str):
    got = parse(GenerateOptions, ["hello", "--lora", name, "--lora-modules", "a=/a"])
    assert got.lora == name


def write(tmp_path: Path, text: str, name: str = "c.toml") -> list[str]:
    file = tmp_path / name
    file.write_text(text)
    return ["--config", str(file)]


def test_flags_win_over_the_config_file(tmp_path: Path):
    argv = write(tmp_path, 'port = 1\nmesh = 4\nmax-loras = 3\nlora_modules = ["a=/a"]\n')
    got = parse(ServeOptions, [*argv, "--port", "2", "--lora-modules", "b=/b"])
    assert (got.port, got.mesh, got.max_loras, got.lora_modules) == (2, 4, 3, ("b=/b",))


def test_lists_of_a_config_file_take_texts_and_tables(tmp_path: Path):
    got = parse(ServeOptions, write(tmp_path, '[lora_modules]\na = "/a"\nb = "/b"\n'))
    assert got.lora_modules == ("a=/a", "b=/b")
    table = 'lora_modules = ["a=/a", {name = "b", path = "/b", pinned = true}]\n'
    got = parse(ServeOptions, write(tmp_path, table))
    assert got.adapters[1] == LoraModule(name="b", path="/b", pinned=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1", "unknown key 'prot': did you mean port?"),
        ("max-lora = 1", "did you mean max_loras"),
        ("zzz = 1", "known are api_key, "),
        ('port = "1"', "port"),
        ("port = true", "port"),
        ("port = 1.5", "port"),
        ("enable_prefix_caching = 1", "enable_prefix_caching"),
        ('lora_modules = "a=/a"', "list"),
        ('dtype = "int4"', "int4"),
        ("port = ", "TOML"),
        ("[section]\nport = 1", "section"),
        ("max-loras = 3\nmax_loras = 4", "twice"),
    ],
)
def test_a_wrong_config_file_is_one_line(tmp_path: Path, text: str, words: str):
    assert words in refused(write(tmp_path, text))


@pytest.mark.parametrize("name", ["c.yaml", "c.YML"])
def test_a_yaml_file_says_what_a_toml_file_says(tmp_path: Path, name: str):
    toml = """
        port = 1
        max-loras = 3
        gpu_memory_utilization = 1
        enable_prefix_caching = false
        served_model_name = ["a", "b"]
        lora_modules = ["a=/a", {name = "b", path = "/b", pinned = true}]
        """
    yaml = """
        port: 1
        max-loras: 3  # vLLM's form
        gpu_memory_utilization: 1
        enable_prefix_caching: false
        served_model_name: [a, b]
        lora_modules:
          - a=/a
          - {name: b, path: /b, pinned: true}
        """
    got = parse(ServeOptions, write(tmp_path, yaml, name))
    assert got == parse(ServeOptions, write(tmp_path, toml))
    assert got != ServeOptions()
    assert parse(ServeOptions, write(tmp_path, "# nothing\n", name)) == ServeOptions()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 1", "unknown key 'prot': did you mean port?"),
        ("port: '1'", "port"),
        ("port: null", "port"),
        ("port: 1.5", "port"),
        ("lora_modules: a=/a", "list"),
        ("dtype: int4", "int4"),
        ("lora_modules: [{name: a, path: 2020-01-01, evil: 2020-01-01}]", "evil"),
        ("port: [", "YAML"),
        ("port: \x00", "YAML"),
        ("[port, 1]", "keys with values"),
        ("1: 2", "1"),
        ("!!python/object/apply:os.getcwd []", "YAML"),
    ],
)
def test_a_wrong_yaml_file_is_one_line(tmp_path: Path, text: str, words: str):
    assert words in refused(write(tmp_path, text, "c.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_shipped_config_loads(file: Path):
    assert parse(ServeOptions, ["--config", str(file)]) != ServeOptions()


def test_there_are_shipped_configs():
    assert len(CONFIGS) >= 3


@pytest.mark.parametrize("cls", [ModelOptions, ServeOptions, GenerateOptions])
def test_every_field_is_documented_and_in_the_help(cls: type):
    docs = field_docs(cls)
    text = io.StringIO()
    with redirect_stdout(text), pytest.raises(SystemExit) as caught:
        build_parser(cls, prog="x").parse_args(["--help"])
    assert caught.value.code == 0
    shown = " ".join(text.getvalue().split())
    for field in dataclasses.fields(cls):
        assert docs[field.name].endswith((".", "B", "t", "n", "s")), field.name
        assert docs[field.name].split(".")[0].split(" ")[0] in shown
        if not field.metadata.get("positional"):
            assert "--" + field.name.replace("_", "-") in shown


def test_generate_takes_a_prompt_and_an_adapter():
    got = parse(GenerateOptions, ["What?", "--lora", "pirate", "--max-tokens", "5"])
    assert (got.prompt, got.lora, got.max_tokens, got.temperature) == ("What?", "pirate", 5, 0.0)
    assert "prompt" in refused([], GenerateOptions)


@pytest.mark.parametrize(
    ("text", "count"),
    [("5", 5), ("1k", 1024), ("1KB", 1000), ("1KiB", 1024), ("1.5G", 3 << 29), ("2 GiB", 2 << 30), ("7B", 7)],
)  # fmt: skip
def test_sizes(text: str, count: int):
    assert parse_bytes(text, "x") == count


@pytest.mark.parametrize(
    ("text", "count"),
    [("32pages", 32), (" 1 Page ", 1), ("32", None), ("1MiB", None), (None, None)],
)
def test_a_budget_may_be_a_number_of_pages(text: str | None, count: int | None):
    assert parse_pages(text, "x") == count


def test_a_path_with_an_equals_sign_keeps_it():
    assert parse_lora_module("a=/x=y").path == "/x=y"
    with pytest.raises(ParameterError):
        parse_lora_module("a=")


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://0.0.0.0:8000", "curl http://127.0.0.1:8000/"),
        ("http://[::]:8000", "curl http://[::1]:8000/"),
        ("http://10.0.0.1:8000", "curl http://10.0.0.1:8000/"),
    ],
)
def test_the_line_to_try_works_on_this_machine(
    address: str, shown: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("JLORA_API_KEY", raising=False)
    with fake_llm(tokenizer) as llm:
        assert shown in welcome(llm, ServeOptions(), address)
        assert "Authorization" not in welcome(llm, ServeOptions(), address)
        given = welcome(llm, ServeOptions(api_key=("secret",)), address)
        assert "Bearer KEY" in given
        monkeypatch.setenv("JLORA_API_KEY", "secret")
        given += welcome(llm, ServeOptions(api_key=("secret",)), address)
        assert "Bearer $JLORA_API_KEY" in given
        assert "secret" not in given
