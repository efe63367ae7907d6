"""The OpenAI routes, driven by the real openai client over HTTP."""

import asyncio
import json
import math
from typing import Any

import pytest

from jlora.engine.sequence import TokenLogprobs
from tests.server import fakes
from tests.server.conftest import Running
from tests.server.fakes import BASE_TEXT, EOS

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
SHOUT = "SHOUT SHOUT SHOUT"


def test_a_completion_is_the_models_text(server: Running):
    got = server.client().completions.create(model="tiny", prompt="hello", max_tokens=200)
    assert got.choices[0].text == BASE_TEXT
    assert got.choices[0].finish_reason == "stop"
    assert got.object == "text_completion"
    assert got.model == "tiny"
    tokenizer = server.llm.tokenizer
    assert got.usage.prompt_tokens == len(tokenizer.encode("hello"))
    assert got.usage.completion_tokens == len(tokenizer.encode(BASE_TEXT)) + 1
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("shout", SHOUT),
        ("tiny:shout", SHOUT),
        ("tiny-alias:shout", SHOUT),
        ("tiny-alias", BASE_TEXT),
    ],
)
def test_the_model_name_picks_the_adapter(server: Running, model: str, text: str):
    got = server.client().chat.completions.create(model=model, messages=HELLO)
    assert got.choices[0].message.content == text
    assert got.model == model


def test_lora_path_picks_an_adapter_for_the_base_model_only(server: Running):
    client = server.client()
    for model, extra, text in (
        ("tiny", "shout", SHOUT),
        ("shout", "shout", SHOUT),
        ("shout", "whisper", SHOUT),
        ("tiny", None, BASE_TEXT),
    ):
        got = client.chat.completions.create(
            model=model, messages=HELLO, extra_body={"lora_path": extra}
        )
        assert got.choices[0].message.content == text


def test_a_stream_has_the_same_text_as_the_whole_reply(server: Running):
    client = server.client()
    chunks = list(
        client.chat.completions.create(model="tiny", messages=HELLO, stream=True, max_tokens=200)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == BASE_TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)
    pieces = client.completions.create(model="shout", prompt="x", stream=True, max_tokens=200)
    assert "".join(chunk.choices[0].text for chunk in pieces) == SHOUT


def test_usage_comes_in_a_last_chunk_only_if_asked(server: Running):
    chunks = list(
        server.client().completions.create(
            model="tiny", prompt="x", stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 16
    assert all(chunk.usage is None for chunk in chunks[:-1])
    steady = list(
        server.client().completions.create(
            model="tiny",
            prompt="x",
            stream=True,
            extra_body={"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        )
    )
    assert [chunk.usage.completion_tokens for chunk in steady][-1] == 16
    assert all(chunk.usage is not None for chunk in steady)


def test_a_stream_ends_with_done_in_sse_form(server: Running):
    got = server.post("/v1/completions", {"model": "tiny", "prompt": "x", "stream": True})
    assert got.headers["content-type"].startswith("text/event-stream")
    events = got.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: ")) for line in events[:-1])


def test_a_batch_of_prompts_keeps_its_order(server: Running):
    client = server.client()
    got = client.completions.create(model="tiny", prompt=["a", "b", "c"], n=2, max_tokens=3)
    assert [choice.index for choice in got.choices] == list(range(6))
    assert got.usage.completion_tokens == 18
    assert got.usage.prompt_tokens == 3
    ids = client.completions.create(model="tiny", prompt=[[5, 6, 7], [8]], max_tokens=3)
    assert [request.prompt for request in server.engine.requests[-2:]] == [[5, 6, 7], [8]]
    assert ids.usage.prompt_tokens == 4


def test_samples_of_one_prompt_have_their_own_seeds(server: Running):
    server.client().completions.create(model="shout", prompt="a", n=3, seed=7)
    assert [request.params.seed for request in server.engine.requests] == [7, 8, 9]
    assert all(
        request.adapter and request.adapter.name == "shout" for request in server.engine.requests
    )


def test_samples_of_a_negative_seed_are_all_seeded(server: Running):
    server.client().completions.create(model="shout", prompt="a", n=3, seed=-2)
    seeds = [request.params.seed for request in server.engine.requests]
    assert None not in seeds  # -1 is vLLM's word for no seed
    assert len(set(seeds)) == 3


def test_every_sampling_field_reaches_the_engine(server: Running):
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "seed": 3,
        "max_tokens": 9,
    }
    extra = {
        "top_k": 5,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "min_tokens": 2,
        "stop_token_ids": [250],
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    server.client().completions.create(
        model="tiny", prompt="x", logit_bias={"7": -100}, stop=["zzz"], **fields, extra_body=extra
    )
    params = server.engine.requests[0].params
    for name, value in {**fields, **extra}.items():
        assert getattr(params, name) == (tuple(value) if isinstance(value, list) else value), name
    assert params.logit_bias == {7: -100}
    assert params.stop == ("zzz",)


def test_chat_without_max_tokens_may_fill_the_context(server: Running):
    server.client().chat.completions.create(model="tiny", messages=HELLO)
    request = server.engine.requests[0]
    assert request.params.max_tokens == server.engine.max_model_len - len(request.prompt)
    server.client().chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=4)
    assert server.engine.requests[1].params.max_tokens == 4


def test_a_stop_string_ends_the_text_and_frees_the_request(server: Running):
    client = server.client()
    for stream in (False, True):
        got = client.completions.create(
            model="tiny", prompt="x", max_tokens=200, stop=["café", "never"], stream=stream
        )
        choices = [chunk.choices[0] for chunk in got] if stream else [got.choices[0]]
        assert "".join(choice.text for choice in choices) == BASE_TEXT.split("café")[0]
        assert choices[-1].finish_reason == "stop"
        assert choices[-1].model_extra["stop_reason"] == "café"
    server.wait(lambda: not server.engine.active)
    kept = client.completions.create(
        model="tiny",
        prompt="x",
        max_tokens=200,
        stop="café",
        extra_body={"include_stop_str_in_output": True},
    )
    assert kept.choices[0].text == BASE_TEXT.split("café")[0] + "café"


def test_completion_logprobs_have_openais_columns(server: Running):
    got = server.client().completions.create(model="tiny", prompt="x", logprobs=2, max_tokens=12)
    logprobs = got.choices[0].logprobs
    assert "".join(logprobs.tokens) == got.choices[0].text
    assert logprobs.token_logprobs == [-0.25] * 12
    assert all(len(top) == 2 for top in logprobs.top_logprobs)
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset[3] == len("".join(logprobs.tokens[:3]))


def test_logprobs_of_a_stream_equal_those_of_the_whole_reply(server: Running):
    client = server.client()
    options: dict[str, Any] = {"model": "tiny", "prompt": "x", "logprobs": 1, "max_tokens": 9}
    whole = client.completions.create(**options).choices[0].logprobs
    parts = [
        chunk.choices[0].logprobs for chunk in client.completions.create(**options, stream=True)
    ]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [item for part in parts for item in getattr(part, name)]
        assert joined == getattr(whole, name), name


def test_echo_scores_the_prompt_as_lm_eval_reads_it(server: Running):
    """lm-eval: token ids in, echo, max_tokens 1, logprobs 1; the first position has no score."""
    context, continuation = [11, 12, 13], [21, 22]
    got = server.client().completions.create(
        model="shout",
        prompt=[context + continuation, context],
        echo=True,
        max_tokens=1,
        logprobs=1,
        temperature=0,
    )
    first, second = got.choices
    names = [server.llm.tokenizer.token_text(i) for i in context + continuation]
    assert first.logprobs.tokens[:-1] == names
    assert first.logprobs.token_logprobs == [None, *[-0.25] * 5]
    assert first.logprobs.top_logprobs[0] is None
    scored = list(zip(first.logprobs.tokens, first.logprobs.top_logprobs, strict=True))[3:-1]
    assert all(token == max(top, key=top.get) for token, top in scored)
    assert first.text.startswith(server.llm.tokenizer.decode(context + continuation))
    assert (first.index, second.index) == (0, 1)


def test_max_tokens_0_with_echo_gives_the_prompt_back(server: Running):
    client = server.client()
    got = client.completions.create(
        model="tiny", prompt="hello", echo=True, max_tokens=0, logprobs=1
    )
    assert got.choices[0].text == "hello"
    assert got.choices[0].logprobs.token_logprobs[0] is None
    assert got.usage.completion_tokens == 0
    plain = client.completions.create(model="tiny", prompt="hello", echo=True, max_tokens=0)
    assert plain.choices[0].text == "hello"
    assert plain.choices[0].logprobs is None
    streamed = client.completions.create(
        model="tiny", prompt="hello", echo=True, max_tokens=2, logprobs=0, stream=True
    )
    chunks = [chunk.choices[0] for chunk in streamed]
    assert chunks[0].text.startswith("hello")
    assert len(chunks[0].logprobs.tokens) == len(server.llm.tokenizer.encode("hello")) + 1


def test_prompt_logprobs_have_vllms_form(server: Running):
    got = server.client().completions.create(
        model="tiny", prompt=[5, 6, 7], max_tokens=1, extra_body={"prompt_logprobs": 1}
    )
    scores = got.choices[0].model_extra["prompt_logprobs"]
    assert scores[0] is None
    assert scores[1]["6"]["rank"] == 1
    assert scores[1]["6"]["logprob"] == -0.25
    assert scores[2]["7"]["decoded_token"] == server.llm.tokenizer.token_text(7)


@pytest.mark.parametrize("value", [math.nan, -math.inf, -1e9])
def test_logprobs_that_json_cannot_hold_are_vllms_lowest(
    server: Running, monkeypatch: pytest.MonkeyPatch, value: float
):
    bad = TokenLogprobs(token=5, logprob=value, rank=1, top={6: value})
    monkeypatch.setattr(fakes, "scored", lambda *_: bad)
    texts = [
        server.post("/v1/completions", {"prompt": "a", "logprobs": 1, "echo": True}).text,
        server.post("/generate", {"text": "a", "return_logprob": True, "top_logprobs_num": 1}).text,
    ]
    for text in texts:
        json.loads(text, parse_constant=pytest.fail)  # called for NaN and Infinity
        assert "-9999.0" in text


def test_tokens_can_be_shown_as_ids(server: Running):
    got = server.client().completions.create(
        model="tiny",
        prompt=[9],
        logprobs=1,
        max_tokens=2,
        extra_body={"return_tokens_as_token_ids": True, "return_token_ids": True},
    )
    ids = server.llm.tokenizer.encode(BASE_TEXT)[:2]
    assert got.choices[0].logprobs.tokens == [f"token_id:{i}" for i in ids]
    assert got.choices[0].model_extra["token_ids"] == ids
    assert got.choices[0].model_extra["prompt_token_ids"] == [9]


def test_chat_logprobs_carry_bytes_and_top_entries(server: Running):
    got = server.client().chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=3, max_tokens=40
    )
    content = got.choices[0].logprobs.content
    text = b"".join(bytes(entry.bytes) for entry in content)
    assert text.decode("utf-8", "ignore").startswith(got.choices[0].message.content[:20])
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    none = server.client().chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, max_tokens=2
    )
    assert none.choices[0].logprobs.content[0].top_logprobs == []


def test_an_adapters_chat_template_wins_over_the_checkpoints(server: Running):
    folder = server.adapters / "poet"
    folder.mkdir()
    (folder / "text.txt").write_text("verse")
    (folder / "chat_template.jinja").write_text("POET:{{ messages[0].content }}")
    server.llm.store.load("poet", folder)
    client = server.client()
    client.chat.completions.create(model="poet", messages=HELLO)
    client.chat.completions.create(model="tiny", messages=HELLO)
    tokenizer = server.llm.tokenizer
    prompts = [
        tokenizer.decode(r.prompt, skip_special_tokens=False) for r in server.engine.requests
    ]
    assert prompts[0] == "POET:hello"
    assert "POET" not in prompts[1]
    assert "hello" in prompts[1]


def test_content_parts_of_text_are_joined(server: Running):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages: list[Any] = [{"role": "user", "content": parts}]
    server.client().chat.completions.create(model="tiny", messages=messages, max_tokens=1)
    prompt = server.llm.tokenizer.decode(server.engine.requests[0].prompt)
    assert "one\ntwo" in prompt


def test_models_lists_the_base_then_the_adapters_with_their_parents(server: Running):
    cards = server.client().models.list().data
    assert [card.id for card in cards] == ["tiny", "tiny-alias", "shout", "whisper"]
    base, adapter = cards[0].model_extra, cards[2].model_extra
    assert (base["root"], base["parent"], base["max_model_len"]) == ("/models/tiny", None, 256)
    assert adapter["root"] == str(server.adapters / "shout")
    assert (adapter["parent"], adapter["max_model_len"]) == ("tiny", None)
    assert server.client().models.retrieve("shout").id == "shout"
    assert server.client().models.retrieve("tiny:shout").id == "shout"
    assert server.client().models.retrieve("tiny").id == "tiny"


def test_tokenize_and_detokenize_are_inverse(server: Running):
    got = server.post("/tokenize", {"prompt": "hello 🙂", "return_token_strs": True}).json()
    assert got["count"] == len(got["tokens"]) == len(got["token_strs"])
    assert got["max_model_len"] == 256
    back = server.post("/detokenize", {"tokens": got["tokens"]}).json()
    assert back == {"prompt": "hello 🙂"}
    chat = server.post("/tokenize", {"model": "shout", "messages": HELLO}).json()
    server.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
    assert chat["tokens"] == server.engine.requests[0].prompt


def test_special_tokens_show_only_if_asked(server: Running):
    options: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 3}
    hidden = server.client().completions.create(
        **options, extra_body={"skip_special_tokens": False}
    )
    assert "<|" not in hidden.choices[0].text
    ended = server.client().completions.create(model="shout", prompt="x", max_tokens=99)
    assert ended.choices[0].text == SHOUT
    assert server.engine.requests[-1].script[-1] == EOS


def test_many_adapters_answer_side_by_side(server: Running):
    """Ten adapters, forty requests at once."""
    texts = {f"a{i}": f"adapter number {i} speaks " * 3 for i in range(10)}
    for name, text in texts.items():
        folder = server.adapters / name
        folder.mkdir()
        (folder / "text.txt").write_text(text)
        server.llm.store.load(name, folder)

    async def ask_all() -> None:
        client = server.async_client()

        async def ask(name: str) -> None:
            stream = await client.completions.create(
                model=name, prompt="go", max_tokens=200, stream=True
            )
            got = "".join([chunk.choices[0].text async for chunk in stream])
            assert got == texts[name]

        await asyncio.gather(*(ask(name) for name in list(texts) * 4))

    asyncio.run(ask_all())
    assert not server.engine.active
