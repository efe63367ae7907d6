"""A null field is a field that was left out, in every body: clients fill their objects with nulls."""

import json
from typing import Any

import pytest

from jlora.errors import ParameterError
from jlora.server.body import Body, parse_body
from jlora.server.protocol import CompletionBody, StreamOptions
from jlora.server.sglang_protocol import SGLangSampling
from tests.server.conftest import Running


def bodies(cls: type[Body] = Body) -> list[type[Body]]:
    """All bodies that there are."""
    return [one for sub in cls.__subclasses__() for one in (sub, *bodies(sub))]


REQUIRED: dict[str, Any] = {
    "prompt": "hello",
    "messages": [{"role": "user", "content": "hello"}],
    "tokens": [5],
}
BODIES = list(dict.fromkeys(bodies()))


def required(cls: type[Body]) -> dict[str, Any]:
    fields = cls.model_fields.items()
    return {name: REQUIRED[name] for name, field in fields if field.is_required()}


def optional(cls: type[Body]) -> list[str]:
    return [name for name, field in cls.model_fields.items() if not field.is_required()]


def parse(cls: type[Body], **fields: Any) -> Body:
    return parse_body(cls, json.dumps(required(cls) | fields).encode())


CASES = [(cls, name) for cls in BODIES for name in optional(cls)]


def test_there_are_many_fields():
    assert len(CASES) > 200


@pytest.mark.parametrize("cls", BODIES)
def test_null_is_the_default_of_every_optional_field(cls: type[Body]):
    plain = parse(cls)
    for name in set(optional(cls)) - cls.NULL_COUNTS:
        got = parse(cls, **{name: None})
        assert getattr(got, name) == getattr(plain, name), name
    nulls: dict[str, Any] = dict.fromkeys(set(optional(cls)) - cls.NULL_COUNTS)
    assert parse(cls, **nulls).model_dump() == plain.model_dump()


def test_null_max_new_tokens_is_sglangs_no_limit():
    assert parse_body(SGLangSampling, b'{"max_new_tokens": null}').max_new_tokens is None
    assert parse_body(SGLangSampling, b"{}").max_new_tokens == 128


def test_null_is_the_default_in_nested_objects_too():
    got = parse(CompletionBody, stream_options={"include_usage": None})
    assert isinstance(got, CompletionBody)
    assert got.stream_options == StreamOptions()


@pytest.mark.parametrize("cls", [cls for cls in BODIES if required(cls)])
def test_null_in_a_required_field_is_an_error_that_names_it(cls: type[Body]):
    for name in required(cls):
        with pytest.raises(ParameterError) as caught:
            parse(cls, **{name: None})
        assert caught.value.param == name


@pytest.mark.parametrize(
    ("path", "body", "cls"),
    [
        ("/v1/completions", {"prompt": "x"}, "CompletionBody"),
        ("/v1/chat/completions", {"messages": REQUIRED["messages"]}, "ChatBody"),
        ("/generate", {"text": "x"}, "SGLangBody"),
        ("/tokenize", {"prompt": "x"}, "TokenizeBody"),
        ("/tokenize", {"messages": REQUIRED["messages"]}, "TokenizeChatBody"),
        ("/detokenize", {"tokens": [5]}, "DetokenizeBody"),
    ],
)
def test_a_request_full_of_nulls_gets_the_answer_of_one_without(
    server: Running, path: str, body: dict[str, Any], cls: str
):
    (kind,) = (one for one in BODIES if one.__name__ == cls)
    plain = server.post(path, body)
    nulls = server.post(path, dict.fromkeys(optional(kind)) | body)
    assert (plain.status_code, nulls.status_code) == (200, 200), nulls.text
    changing = ("id", "created", "meta_info", "system_fingerprint")
    got, want = nulls.json(), plain.json()
    for reply in (got, want):
        for key in changing:
            reply.pop(key, None)
    assert got == want
