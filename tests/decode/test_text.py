"""Text: characters and stop strings that cross tokens, ragged prompts, pieces that join to the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from lmx.core.errors import ConfigError, DataError
from lmx.decode import PromptLookup, generate, generate_text, stream_text
from lmx.decode.text import BROKEN, Pieces
from lmx.models.unigram import from_counts

KEY = jax.random.key(2)


class Bytes:
    """UTF-8 bytes, and 256 for the end of a text."""

    vocab_size, eos_id = 257, 256

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Words:
    """Tokens of several characters that are written without the space before the first, as SentencePiece
    does."""

    pieces = (" the", " end", "ing", "\n\n", " of", "\nQ", ": no", "END")
    vocab_size, eos_id = len(pieces), None

    def encode(self, text):
        ids = []
        while text:
            (i,) = (i for i, piece in enumerate(self.pieces) if (" " * (not ids) + text).startswith(piece))
            text = (" " * (not ids) + text)[len(self.pieces[i]) :]
            ids.append(i)
        return ids

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids).removeprefix(" ")


@struct.dataclass
class Reciter:
    """Recites `text` (n,) token by token, from wherever the row is: position decides, not what was read."""

    text: jax.Array
    vocab_size: int = struct.field(pytree_node=False, default=257)

    def start(self, batch, length):
        return jnp.zeros((batch,), jnp.int32)

    def step(self, state, tokens):
        places = state[:, None] + jnp.arange(tokens.shape[1])
        said = self.text[places % self.text.size]
        return jax.nn.log_softmax(20.0 * jax.nn.one_hot(said, self.vocab_size)), state + tokens.shape[1]

    def rewind(self, state, lengths):
        return lengths.astype(jnp.int32)


def reciter(text, tokenizer=None):
    tokenizer = tokenizer or Bytes()
    ids = tokenizer.encode(text) if isinstance(text, str) else text
    return Reciter(jnp.asarray(ids, jnp.int32), tokenizer.vocab_size)


def both(model, tokenizer, prompt, **options):
    """The whole text, after checking that the streamed pieces join to it."""
    (text,) = generate_text(model, tokenizer, prompt, **options)
    pieces = list(stream_text(model, tokenizer, prompt, **options))
    assert "".join(pieces) == text and all(pieces)
    return text


def test_the_text_is_the_continuation_up_to_eos():
    model = reciter([*b"Once upon a time", 256, *b"never said"])
    assert both(model, Bytes(), "", max_new_tokens=40) == "Once upon a time"
    assert both(model, Bytes(), "Once", max_new_tokens=40) == " upon a time"
    assert both(model, Bytes(), "Once", max_new_tokens=5) == " upon"


def test_any_of_several_tokens_ends_a_text():
    tokenizer = Bytes()
    tokenizer.eos_ids = (ord("!"), 256)
    model = reciter([*b"Stop! Or go on", 256])
    assert both(model, tokenizer, "", max_new_tokens=40) == "Stop"
    assert both(model, tokenizer, "Stop!", max_new_tokens=40) == " Or go on"
    assert generate_text(model, tokenizer, "", max_new_tokens=8, draft=PromptLookup(3)) == ["Stop"]
    tokenizer.eos_ids = ()
    assert both(model, tokenizer, "", max_new_tokens=7) == "Stop! O"


def test_prompts_of_unlike_length_at_once():
    model = reciter([*b"Once upon a time", 256])
    texts = generate_text(model, Bytes(), ["", "Once", "x" * 14], max_new_tokens=6)
    assert texts == ["Once u", " upon ", "me"]


def test_a_prompt_begins_with_eos_as_a_document_does():
    model = from_counts(np.ones(257))
    ids = np.array([[256, *b"ab"]])
    made = generate(model, ids, max_new_tokens=9, temperature=1.0, eos_id=256, key=KEY, lengths=np.array([3]))
    expected = Bytes().decode(np.asarray(made.tokens)[0, : made.lengths[0]])
    text = generate_text(model, Bytes(), "ab", max_new_tokens=9, temperature=1.0, key=KEY)[0]
    assert text == expected.rstrip(BROKEN)


@pytest.mark.parametrize("stop", ["n a", ("never", " a t", "n a"), ("upon a time!", "n a")])
def test_text_is_cut_before_the_first_stop_string(stop):
    assert both(reciter("Once upon a time."), Bytes(), "On", max_new_tokens=40, stop=stop) == "ce upo"


def test_a_stop_string_may_begin_and_end_inside_tokens():
    model = reciter([0, 1, 2, 3, 5, 6, 7], Words())
    assert both(model, Words(), "of", max_new_tokens=7) == " the ending\n\n\nQ: noEND"
    assert both(model, Words(), "of", max_new_tokens=7, stop="ing\n\n\nQ:") == " the end"
    assert both(model, Words(), "of", max_new_tokens=7, stop="Q: noE") == " the ending\n\n\n"


def test_half_a_stop_string_is_given_in_the_end():
    assert both(reciter("one two thr"), Bytes(), "on", max_new_tokens=8, stop="three") == "e two th"


def test_rows_stop_each_on_their_own():
    texts = generate_text(
        reciter("abcdefghij" * 9), Bytes(), ["", "abcd"], max_new_tokens=9, stop=("f", "zz")
    )
    assert texts == ["abcde", "e"]


def test_characters_are_never_broken():
    said = "naïve 日本語 🙂 done"
    model = reciter(said + "\0" * 60)
    pieces = list(stream_text(model, Bytes(), "n", max_new_tokens=len(said.encode()) - 1))
    assert "".join(pieces) == said[1:] and BROKEN not in "".join(pieces) and "🙂" in pieces
    for n in range(len(said.encode())):
        row = Pieces(Bytes(), [256])
        text = "".join([*map(row.push, said.encode()[:n]), row.close()])
        assert text == said.encode()[:n].decode(errors="ignore")


def test_bytes_that_are_no_text_inside_a_text():
    model = reciter([*b"ab", 0xFF, 0xFE, *b"cd", 0xE6])
    assert both(model, Bytes(), "a", max_new_tokens=6) == f"b{BROKEN}{BROKEN}cd"


@pytest.mark.parametrize("seed", range(5))
def test_pieces_join_to_the_decoded_whole(seed):
    """Random bytes, in which almost nothing is valid UTF-8."""
    ids = np.random.default_rng(seed).choice([0x41, 0x80, 0xC3, 0xA9, 0xE6, 0x97, 0xF0, 0xFF], 60)
    row = Pieces(Bytes(), [256, 0x61])
    assert "".join([*map(row.push, ids), row.close()]) == Bytes().decode(ids).rstrip(BROKEN)


def test_tokens_beyond_the_tokenizer_have_no_text():
    model = Reciter(jnp.array([65, 300, 66]), 320)
    assert both(model, Bytes(), "", max_new_tokens=4) == "ABA"


def test_prompts_of_about_one_length_share_a_compilation():
    traces = []

    @struct.dataclass
    class Counted(Reciter):
        def step(self, state, tokens):
            traces.append(tokens.shape)
            return super().step(state, tokens)

    model = Counted(jnp.arange(257))
    for prompt in ("a", "a longer prompt", "x" * 31):
        generate_text(model, Bytes(), prompt, max_new_tokens=3)
    assert len(traces) == 2  # one compilation: the prefill and the loop


def test_sampling_options_reach_the_model():
    model = from_counts(np.arange(257))
    texts = [
        generate_text(model, Bytes(), "a", max_new_tokens=8, temperature=1.0, top_k=k, key=KEY)[0]
        for k in (1, 99)
    ]
    assert texts[0] == "" and texts[1] != ""  # the most probable token is eos


@pytest.mark.parametrize("call", [generate_text, stream_text])
@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        (["a", 3], {}, ConfigError, r"prompts must be one string or several"),
        ("a", dict(stop=("",)), ConfigError, r"stop must be strings .* got \('',\)"),
        ("a", dict(stop=((13,),)), ConfigError, "stop must be strings .* Token ids belong to generate"),
        ("a", dict(temperature=1.0), ConfigError, "needs a key"),
        ("a", dict(max_new_tokens=0), ConfigError, "max_new_tokens is 0"),
    ],
)
def test_errors(call, prompt, options, error, message):
    with pytest.raises(error, match=message):
        call(reciter("abc"), Bytes(), prompt, **(dict(max_new_tokens=2) | options))


def test_errors_of_prompts_and_tokenizers():
    with pytest.raises(ConfigError, match="at least one"):
        generate_text(reciter("abc"), Bytes(), [], max_new_tokens=2)
    with pytest.raises(
        DataError, match="does not fit the model: it has 257 tokens, the model's vocabulary 8"
    ):
        generate_text(reciter([1, 2], Words()), Bytes(), "a", max_new_tokens=2)
    with pytest.raises(ConfigError, match="prompt of row 0 is empty"):
        generate_text(reciter([1, 2], Words()), Words(), "", max_new_tokens=2)


class Marked(Bytes):
    """Bytes in which ^ is a special token when asked."""

    vocab_size = 258

    def encode(self, text, special=False):
        return [257 if special and letter == "^" else ord(letter) for letter in text]


def test_rendered_chats_bring_their_own_special_tokens():
    model = reciter("0123456789", Marked())  # says where it stands
    plain, chat = ({"special": special} for special in (False, True))
    assert both(model, Marked(), "a^b", max_new_tokens=3, **plain) == "345"  # the end of a text stands first
    assert both(model, Marked(), "a^b", max_new_tokens=3, **chat) == "234"


def test_beams_and_drafts_give_the_same_text_where_there_is_one():
    model, prompts = reciter("abcabcabc" * 9), ["", "abcab", "abcabcabcabc"]
    wanted = generate_text(model, Bytes(), prompts, max_new_tokens=9, stop="cab")
    for how in (dict(num_beams=3), dict(draft=PromptLookup(4))):
        assert generate_text(model, Bytes(), prompts, max_new_tokens=9, stop="cab", **how) == wanted


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=0.5, key=KEY), "temperature cannot go with that"),
        (dict(draft=PromptLookup()), "a draft cannot go with that"),
        (dict(repetition_penalty=1.2), "num_beams=2 searches .* repetition_penalty cannot go with that"),
    ],
)
def test_what_cannot_go_with_beam_search(options, message):
    with pytest.raises(ConfigError, match=message):
        generate_text(reciter("abc"), Bytes(), "a", max_new_tokens=2, num_beams=2, **options)
