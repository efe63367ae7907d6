"""Detokenising, stop strings and the tokenizer, against transformers and against plain search."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jlora.engine.params import SamplingParams
from jlora.engine.sequence import Event
from jlora.errors import ModelError, ParameterError
from jlora.stream import Choice, StopStrings
from jlora.tokenizer import Detokenizer, Tokenizer
from tests.server.conftest import tokenizer as tokenizer
from tests.server.conftest import tokenizer_folder as tokenizer_folder

TEXTS = ["hello world", "naïve café", "🙂🙃 日本語", "a  12\n\t3", "", " lead", "\u200d👩‍👩‍👧"]
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi 🙂"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_what_the_tokenizer_decodes(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([i]) for i in ids]
    assert "".join(pieces) + detokenizer.push([], final=True) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_broken_character_appears_only_at_the_end(tokenizer: Tokenizer):
    ids = tokenizer.encode("🙂")
    assert len(ids) > 1
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(ids[:-1]) == ""
    assert detokenizer.push([], final=True) == "\ufffd"


@given(st.lists(st.integers(4, 255), max_size=30))
def test_any_token_sequence_decodes_as_the_library_does(ids: list[int]):
    tokenizer = _TOKENIZER.get()
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push([i]) for i in ids) + detokenizer.push([], final=True)
    assert text == tokenizer.decode(ids)


class _Lazy:
    """hypothesis tests take no fixtures of function scope; the tokenizer is made once here."""

    made: Tokenizer | None = None

    def get(self) -> Tokenizer:
        if self.made is None:
            import tempfile

            from tests import tiny

            folder = Path(tempfile.mkdtemp())
            tiny.make_tokenizer(folder)
            self.made = Tokenizer.from_folder(folder)
        return self.made


_TOKENIZER = _Lazy()


def test_special_tokens_are_left_out_unless_asked(tokenizer: Tokenizer):
    ids = [1, *tokenizer.encode("hi"), 2]
    assert Detokenizer(tokenizer).push(ids) == "hi"
    kept = Detokenizer(tokenizer, skip_special_tokens=False)
    assert kept.push(ids) == "<|bos|>hi<|im_end|>"


def test_sentencepiece_vocabularies_give_spaces_and_bytes(tmp_path: Path):
    vocab = {
        "<unk>": 0,
        "▁Hello": 1,
        "▁world": 2,
        "<0xF0>": 3,
        "<0x9F>": 4,
        "<0x99>": 5,
        "<0x82>": 6,
    }
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([i]) for i in (1, 2, 3, 4, 5, 6)]
    assert pieces == [" Hello", " world", "", "", "", "🙂"]
    assert tokenizer.token_bytes(3) == b"\xf0"


def test_encoding_and_chat_equal_transformers(tokenizer_folder: Path, tokenizer: Tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text)
    for generation in (True, False):
        options: dict[str, Any] = {"add_generation_prompt": generation}
        want = theirs.apply_chat_template(MESSAGES, tokenize=False, **options)
        assert tokenizer.render_chat(MESSAGES, **options) == want
    assert tokenizer.special_tokens["bos_token"] == theirs.bos_token


def test_templates_see_what_transformers_gives_them(tokenizer_folder: Path, tokenizer: Tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    template = (
        "{{ bos_token }}{%- for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}"
        "{{ m | tojson }}{% generation %}{{ m['content'] | trim }}{% endgeneration %}\n{% endfor %}"
        "{% if tools is none and extra is defined %}{{ extra }}{% endif %}{{ eos_token }}"
    )
    want = theirs.apply_chat_template(
        MESSAGES, chat_template=template, tokenize=False, extra="<é&>"
    )
    got = tokenizer.render_chat(
        MESSAGES, template=template, add_generation_prompt=False, variables={"extra": "<é&>"}
    )
    assert got == want


def test_a_final_message_can_be_continued(tokenizer: Tokenizer):
    messages = [MESSAGES[1], {"role": "assistant", "content": "The answer is "}]
    text = tokenizer.render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("The answer is")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system please') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for a in range(10**9) %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ 9 ** 999999999 }}",
        "{% for",
        "{{ undefined.attribute }}",
        "{{ messages[99].content.strip() }}",
    ],
)
def test_a_hostile_or_broken_template_is_the_requests_error(tokenizer: Tokenizer, template: str):
    with pytest.raises(ParameterError) as caught:
        tokenizer.render_chat(MESSAGES, template=template)
    assert caught.value.param == "messages"


def test_a_folder_without_a_tokenizer_is_a_one_line_error(tmp_path: Path):
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_chat_template_files_and_lists_are_found(tokenizer_folder: Path, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    config = {
        "chat_template": [{"name": "default", "template": "D"}, {"name": "x", "template": "X"}]
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_folder(tmp_path).chat_templates == {"default": "D", "x": "X"}
    (tmp_path / "chat_template.jinja").write_text("F")
    assert Tokenizer.from_folder(tmp_path).render_chat(MESSAGES) == "F"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ParameterError, match="no chat template"):
        Tokenizer.from_folder(tmp_path).render_chat(MESSAGES)


def first_stop(text: str, stops: list[str]) -> str | None:
    """The text before the stop string that a reader would see complete first."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))]
    return None


@given(
    st.text("ab", max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), min_size=20, max_size=20),
)
def test_stop_strings_are_found_however_the_text_is_cut(
    text: str, stops: list[str], sizes: list[int]
):
    finder, shown, at, found = StopStrings(stops), "", 0, False
    for size in sizes:
        cut = finder.push(text[at : at + size])
        at += size
        shown += cut.text
        if cut.stop is not None:
            found = True
            break
    if not found:
        shown += finder.flush()
    want = first_stop(text, stops)
    assert found == (want is not None)
    assert shown == (text if want is None else want)


def choice(tokenizer: Tokenizer, **params: object) -> Choice:
    return Choice(
        index=0,
        request_id="r",
        prompt_ids=[5],
        params=SamplingParams(**params),  # type: ignore[arg-type]
        tokenizer=tokenizer,
    )


def test_a_stop_token_is_counted_but_not_shown(tokenizer: Tokenizer):
    ids = tokenizer.encode("ab")
    one = choice(tokenizer, skip_special_tokens=False)
    for token in ids:
        one.feed(Event(request_id="r", token_ids=(token,)), 0.0)
    last = one.feed(Event(request_id="r", token_ids=(2,), finish_reason="stop"), 1.0)
    assert last is not None
    assert (one.text, one.token_ids) == ("ab", [*ids, 2])
    kept = choice(tokenizer, skip_special_tokens=False, include_stop_str_in_output=True)
    kept.feed(Event(request_id="r", token_ids=(*ids, 2), finish_reason="stop"), 0.0)
    assert kept.text == "ab<|im_end|>"


def test_tokens_after_a_stop_string_are_dropped(tokenizer: Tokenizer):
    one = choice(tokenizer, stop=("b",))
    ids = [tokenizer.encode(letter)[0] for letter in "abab"]
    delta = one.feed(Event(request_id="r", token_ids=tuple(ids)), 0.0)
    assert delta is not None
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("a", ids[:2], "stop")
    assert one.feed(Event(request_id="r", finish_reason="abort"), 0.0) is None


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer):
    ids = [tokenizer.encode(letter)[0] for letter in "abab"]
    one = choice(tokenizer, stop=("b",), min_tokens=2)
    for token in ids:
        one.feed(Event(request_id="r", token_ids=(token,)), 0.0)
    assert one.text == "aba"
    assert one.finish_reason == "stop"


def test_held_text_comes_out_at_the_end(tokenizer: Tokenizer):
    one = choice(tokenizer, stop=("abc",))
    ids = [tokenizer.encode(letter)[0] for letter in "xab"]
    one.feed(Event(request_id="r", token_ids=tuple(ids[:2])), 0.0)
    assert one.text == "x"
    one.feed(Event(request_id="r", token_ids=(ids[2],), finish_reason="length"), 0.0)
    assert one.text == "xab"
