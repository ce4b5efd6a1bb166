"""Streaming text: never half a character, never a stop string, nothing lost."""

from hypothesis import given, settings
from hypothesis import strategies as st

from longstride.engine.tokenizer import StreamDecoder, punctuation
from tests.tiny import ByteTokenizer

text = st.text(st.sampled_from("ab \n.é€😀STOP"), max_size=60)


def streamed(content: str, stops=()):
    decoder = StreamDecoder(ByteTokenizer(), stops)
    pieces = [decoder.push(i) for i in content.encode()]
    return [*pieces, decoder.flush()], decoder.stopped


@settings(deadline=None)
@given(text)
def test_the_pieces_are_whole_characters_and_make_the_text(content):
    pieces, _ = streamed(content)
    assert "".join(pieces) == content
    assert not any("�" in piece for piece in pieces)


@settings(deadline=None)
@given(text, st.lists(st.sampled_from(["STOP", "TO", ".\n", "€"]), min_size=1, max_size=2))
def test_nothing_of_a_stop_string_is_ever_emitted(content, stops):
    pieces, stopped = streamed(content, stops)
    found = [content.find(stop) for stop in stops if stop in content]
    out = "".join(pieces)
    assert stopped == bool(found)
    # the first stop string to be complete ends the text
    assert content.startswith(out)
    assert not any(stop in out for stop in stops)
    if not found:
        assert out == content


def test_a_long_answer_comes_out_whole():
    content = "wörd " * 200
    pieces, _ = streamed(content)
    assert "".join(pieces) == content
    assert max(map(len, pieces)) <= 2


def test_a_broken_character_at_the_end_is_dropped():
    decoder = StreamDecoder(ByteTokenizer())
    out = "".join(decoder.push(i) for i in "a€".encode()[:-1]) + decoder.flush()
    assert out == "a"


def test_punctuation_is_what_is_nothing_else():
    texts = [".", "?!", '."', ",", ";\n", "\n", " ", "a.", "3", ")"]

    class Words(ByteTokenizer):
        size, special = len(texts), frozenset()

        def decode(self, ids):
            return "".join(texts[i] for i in ids)

    found = punctuation(Words())
    assert {texts[i] for i in found.ends} == {".", "?!", '."'}
    assert {texts[i] for i in found.separators} == {".", "?!", '."', ",", ";\n", "\n"}
