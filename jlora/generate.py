"""`python -m jlora.generate "question" --lora NAME`: one answer from the shell, as it is made."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from jlora.cli import fail, parse
from jlora.console import ProgressBars, prepare_devices, setup_logging, undisturbed
from jlora.engine.params import SamplingParams
from jlora.errors import JloraError, ParameterError
from jlora.llm import LLM, template_of
from jlora.options import ModelOptions

PROG = "jlora.generate"


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions):
    """One prompt, one answer on stdout."""

    prompt: str = field(default="", metadata={"positional": True})
    """What to ask; - reads it from stdin."""

    lora: str | None = None
    """Name of the adapter to use: one of --lora-modules or of the demo's."""

    raw: bool = False
    """Complete the prompt as it is, without the chat template."""

    system: str | None = None
    """System message."""

    max_tokens: int = 256
    """Most tokens to generate."""

    temperature: float = 0.0
    """0 takes the likeliest token each time."""

    top_p: float = 1.0
    """Sample among the tokens that make up this share of the probability."""

    max_num_seqs: int | None = 1
    """Requests that may run at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt:
            raise ParameterError(
                'a prompt is needed: python -m jlora.generate "question"', "prompt"
            )
        self.check_adapter("lora", self.lora)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(GenerateOptions, argv, prog=PROG, accepted=("--enable-lora",))
    setup_logging("warning")
    prepare_devices(options.mesh)
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    try:
        params = SamplingParams(
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        )
        with ProgressBars() as progress:
            llm = LLM.load(options, progress=progress)
        try:
            problem = answer(llm, options, text, params)
        finally:
            with undisturbed():
                llm.close()
    except JloraError as error:
        fail(PROG, error)
    except KeyboardInterrupt:
        return 130
    if problem is not None:
        print(f"{PROG}: error: the request failed: {problem}", file=sys.stderr)
        return 1
    return 0


def answer(llm: LLM, options: GenerateOptions, text: str, params: SamplingParams) -> str | None:
    """Print the answer to `text` while it comes; what went wrong, if the request failed."""
    entry = llm.resolve(options.lora)
    tokenizer = llm.tokenizer_of(entry)
    if options.raw:
        ids = tokenizer.encode(text)
    else:
        messages = [{"role": "system", "content": options.system}] if options.system else []
        messages.append({"role": "user", "content": text})
        ids = tokenizer.encode_chat(messages, template=template_of(entry))
    room = llm.engine.max_model_len - len(ids)
    if params.max_tokens is not None and 0 < room < params.max_tokens:
        params = SamplingParams(
            max_tokens=room, temperature=params.temperature, top_p=params.top_p, seed=params.seed
        )
    stream = llm.stream([ids], params, adapter=entry)
    try:
        for delta in stream:
            print(delta.text, end="", flush=True)
        print()
    finally:
        stream.close()
    return stream.choices[0].error


if __name__ == "__main__":
    sys.exit(main())
