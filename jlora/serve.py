"""`python -m jlora.serve`: a base model and its adapters behind OpenAI's HTTP API."""

import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Sequence

from jlora.cli import fail, parse
from jlora.console import ProgressBars, memory_plan, prepare_devices, setup_logging, version
from jlora.errors import JloraError
from jlora.llm import LLM
from jlora.options import ServeOptions
from jlora.server.run import bind, make_server, run

PROG = "jlora.serve"
log = logging.getLogger("jlora.serve")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(ServeOptions, argv, prog=PROG, accepted=("--enable-lora",))
    if not options.api_key and (key := os.environ.get("JLORA_API_KEY")):
        options = dataclasses.replace(options, api_key=(key,))
    setup_logging(options.log_level)
    # A stop while the model loads is an orderly end too.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    prepare_devices(options.mesh)
    try:
        sock = bind(options.host, options.port)
        with ProgressBars() as progress:
            llm = LLM.load(options, progress=progress)
    except JloraError as error:
        fail(PROG, error)
    host, port = sock.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    server = make_server(
        llm,
        options,
        version=version(),
        on_start=lambda: print(welcome(llm, options, address), flush=True),
    )
    run(server, sock)
    llm.close()
    return 0 if server.failure is None else 1


def welcome(llm: LLM, options: ServeOptions, address: str) -> str:
    """What a user sees when the server is ready: memory, address, names, a line to try."""
    adapters = [str(entry["name"]) for entry in llm.store.adapters()]
    name = adapters[-1] if adapters else llm.names[0]
    here = address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    secret = "$JLORA_API_KEY" if os.environ.get("JLORA_API_KEY") in options.api_key else "KEY"
    key = f' -H "Authorization: Bearer {secret}"' if options.api_key else ""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'
    lines = [
        *([memory_plan(llm.parts.plan)] if llm.parts.plan is not None else []),
        f"Listening on {address}",
        f"Models: {', '.join([*llm.names, *adapters])}",
        f"Try: curl {here}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
