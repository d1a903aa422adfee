"""words/: the nouns of a caption and the tokens that wrote them, with toy decoders and with real tokenizers."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from HanTa import HanoverTagger
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mmneurons.errors import MmneuronsError, SettingError, WordError
from mmneurons.words import (
    HantaTagger,
    Noun,
    SpacyTagger,
    Word,
    find_nouns,
    find_words,
    same_stem,
    says,
    singular,
    tagger_for,
    token_spans,
)
from mmneurons.words.languages import hanta

TRAINING_CAPTIONS = [
    "An image of a dog and a cat on the grass.",
    "Two dogs near a bus and a Dog on the street.",
    "A man rides a wave on a surfboard, a hot dog in a bun.",
]
EOS = "<eos>"


@dataclass
class Toy:
    """A tokenizer whose pieces are given: piece i is token i, "" a special token. Joined as bytes, like GPT-2's."""

    pieces: Sequence[str | bytes]

    @property
    def ids(self) -> list[int]:
        return list(range(len(self.pieces)))

    def decode(self, ids: Sequence[int]) -> str:
        pieces = (self.pieces[i] for i in ids)
        return b"".join(p.encode() if isinstance(p, str) else p for p in pieces).decode(errors="replace")

    @property
    def caption(self) -> str:
        return self.decode(self.ids).strip()

    def nouns(self, answer_prefix: str = "") -> list[tuple[str, tuple[int, ...]]]:
        nouns = find_nouns(self.caption, self.ids, self.decode, answer_prefix=answer_prefix)
        return [(w.text, w.steps) for w in nouns]

    def words(self, *wanted: str) -> list[tuple[str, tuple[int, ...]]]:
        return [(w.text, w.steps) for w in find_words(wanted, self.caption, self.ids, self.decode)]


def byte_level() -> Tokenizer:
    """GPT-2's kind: a space belongs to the word after it, a token may be part of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TRAINING_CAPTIONS, trainer)
    return tokenizer


def llama() -> Tokenizer:
    """Llama 2's kind: pieces begin with the space, the first of a text loses it, unknown characters are bytes."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = spaces
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator(TRAINING_CAPTIONS, trainers.BpeTrainer(vocab_size=80, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = [EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, byte_fallback=True))
    tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([EOS])
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT's kind: '##' goes on with a word; clean-up takes the space before a full stop back."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    letters = [chr(c) for c in range(33, 127)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", EOS], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator([*TRAINING_CAPTIONS, " ".join("x" + c for c in letters)], trainer)
    return tokenizer


BYTE_LEVEL, LLAMA, WORD_PIECE = byte_level(), llama(), word_piece()
REAL = pytest.mark.parametrize(
    "tokenizer", [BYTE_LEVEL, LLAMA, WORD_PIECE], ids=["byte-level BPE", "Llama", "WordPiece"]
)


def id_of(tokenizer: Tokenizer, piece: str) -> int:
    return tokenizer.get_vocab()[piece]


def written(tokenizer: Tokenizer, ids: Sequence[int], word: Word) -> str:
    """What a word's tokens are in the vocabulary, marks of spaces and joins taken off."""
    pieces = [tokenizer.id_to_token(ids[step]) or "" for step in word.steps]
    return "".join(piece.strip("Ġ▁").removeprefix("##") for piece in pieces)


# ---- the tokens that wrote a word


@REAL
def test_each_noun_has_all_of_its_own_tokens(tokenizer: Tokenizer):
    text = "A Dog and a rhinoceros near two dogs, a dog and a cat."
    ids = tokenizer.encode(text).ids
    nouns = find_nouns(text, ids, tokenizer.decode)
    assert [w.text for w in nouns] == ["Dog", "rhinoceros", "dogs", "dog", "cat"]
    assert [w.lemma for w in nouns] == ["dog", "rhinoceros", "dog", "dog", "cat"]
    assert [text[w.start : w.stop] for w in nouns] == [w.text for w in nouns]
    assert [written(tokenizer, ids, w) for w in nouns] == [w.text for w in nouns]
    assert len(nouns[1].steps) > 2


@REAL
def test_the_first_token_and_the_last_are_found(tokenizer: Tokenizer):
    ids = tokenizer.encode("rhinoceros").ids
    [word] = find_nouns("rhinoceros", ids, tokenizer.decode)
    # Llama may write the space before the first word, which decoding drops, as a token of its own.
    assert written(tokenizer, ids, word) == "rhinoceros"
    assert word.steps[-1] == len(ids) - 1


@REAL
def test_special_tokens_anywhere_write_nothing_and_shift_nothing(tokenizer: Tokenizer):
    text = "A dog and a rhinoceros."
    eos = id_of(tokenizer, EOS)
    plain = tokenizer.encode(text).ids
    ids = [eos] + [i for token in plain for i in (token, eos)] + [eos, eos]
    assert [w.steps for w in find_nouns(text, ids, tokenizer.decode)] == [
        tuple(1 + 2 * step for step in w.steps) for w in find_nouns(text, plain, tokenizer.decode)
    ]
    spans = token_spans(ids, tokenizer.decode)
    assert all(start == stop for token, (start, stop) in zip(ids, spans, strict=True) if token == eos)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, LLAMA], ids=["byte-level BPE", "Llama"])
def test_words_of_many_bytes_have_the_tokens_of_all_their_bytes(tokenizer: Tokenizer):
    text = "😀😀 A piñata, an éclair 🦏 and a cafe\u0301."
    ids = tokenizer.encode(text).ids
    nouns = find_nouns(text, ids, tokenizer.decode)
    assert [w.text for w in nouns] == ["piñata", "éclair", "cafe\u0301"]
    for word in nouns:
        assert tokenizer.decode([ids[step] for step in word.steps]).strip() == word.text


def test_a_token_that_begins_a_character_after_a_space_is_part_of_the_word():
    # GPT-2 has such tokens: a space and the first byte of what follows it.
    toy = Toy(["An", b" \xc3", b"\xa9clair", " or", b" \xf0\x9f", b"\xa6", b"\x8f", "."])
    assert toy.caption == "An éclair or 🦏."
    assert toy.nouns() == [("éclair", (1, 2))]
    assert token_spans(toy.ids, toy.decode) == [(0, 2), (2, 4), (3, 9), (9, 12), (12, 14), (13, 14), (13, 14), (14, 15)]


def test_byte_fallback_that_takes_a_finished_character_back_does_not_move_it():
    # ByteFallback shows a whole run of byte tokens as U+FFFD until the run is valid.
    ids = [id_of(LLAMA, f"<0x{byte:02X}>") for byte in "😀é".encode()]
    assert LLAMA.decode(ids[:5]) == "\ufffd" * 5
    assert token_spans(ids, LLAMA.decode) == [(0, 1)] * 4 + [(1, 2)] * 2


def test_clean_up_that_rewrites_the_end_of_the_text_costs_no_later_word_its_token():
    pieces = ["a", "dog", "does", "n", "'", "t", "see", "a", "cat", "."]

    def decode(ids: Sequence[int]) -> str:  # BERT's kind, with the clean-up of transformers
        return " ".join(pieces[i] for i in ids).replace(" .", ".").replace(" ' ", "'").replace(" n't", "n't")

    ids = list(range(len(pieces)))
    caption = "a dog doesn't see a cat."
    assert [decode(ids[:5]), decode(ids)] == ["a dog does n '", caption]
    found = find_words(["doesn't", "cat"], caption, ids, decode)
    assert [w.steps for w in found] == [(2, 3, 4, 5), (8,)]


def test_a_caption_cut_within_a_character_keeps_the_words_before_it():
    toy = Toy(["A", " dog", b" \xf0", b"\x9f"])
    assert toy.nouns() == [("dog", (1,))]


def test_spans_stay_within_the_text_when_a_token_takes_some_back():
    texts = ["A", "A d", "A"]
    assert token_spans([0, 1, 2], lambda ids: texts[len(ids) - 1]) == [(0, 1), (1, 1), (1, 1)]


def test_one_token_may_write_two_words():
    assert Toy(["A", " dog cat", "s."]).nouns() == [("dog", (1,)), ("cats", (1, 2))]


def test_each_prefix_is_decoded_once():
    toy = Toy(["A", " dog", " and", " a", " cat"])
    seen: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        seen.append(len(ids))
        return toy.decode(ids)

    find_nouns(toy.caption, toy.ids, decode)
    assert seen == [1, 2, 3, 4, 5]


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30)


@given(text=ANY_TEXT, cuts=st.lists(st.integers(0, 120)))
def test_spans_are_the_characters_whose_bytes_a_token_wrote(text: str, cuts: list[int]):
    data = text.encode()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    toy = Toy([data[a:b] for a, b in itertools.pairwise(edges)])
    character_of = [i for i, character in enumerate(text) for _ in character.encode()]
    for (a, b), span in zip(itertools.pairwise(edges), token_spans(toy.ids, toy.decode), strict=True):
        if a < b:
            assert span == (character_of[a], character_of[b - 1] + 1)


@REAL
@settings(max_examples=60)
@given(text=ANY_TEXT | st.text("aé. 🦏'tnDog,", max_size=20))
def test_spans_never_decrease_and_cover_the_text(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text).ids
    spans = token_spans(ids, tokenizer.decode)
    decoded = tokenizer.decode(ids)
    assert len(spans) == len(ids)
    end = 0
    for start, stop in spans:
        # Overlap is one character at most, and only where two tokens shared it.
        assert end - 1 <= start <= end
        assert start <= stop
        assert end <= stop
        end = stop
    assert end == len(decoded)
    if decoded.isascii():
        assert "".join(decoded[start:stop] for start, stop in spans) == decoded


def test_no_tokens_no_spans():
    assert token_spans([], Toy([]).decode) == []
    assert find_nouns("", [], Toy([]).decode) == []


# ---- the nouns


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("An image of a dog and a cat on the grass", "image dog cat grass"),
        ("a Dog", "dog"),
        ("two buses", "bus"),
        ("dogs playing", "dog"),
        ("a man riding a wave on a surfboard", "man wave surfboard"),
        ("a hot dog", "dog"),
        ("A red fire hydrant.", "fire hydrant"),
        ("an orange", "orange"),
        ("a T-shirt", "t-shirt"),
        ("people", "people"),
        ("knives", "knife"),
        ("the man's hat, the dogs' house", "man hat dog house"),
        ("the man\u2019s hat", "man hat"),
        ("I don't know.", ""),
        ("A DOG And A Cat", "dog cat"),
        ("a giraffe, a zorblat", "giraffe zorblat"),  # words that HanTa does not know
        ("an ostrich at the zoo", "ostrich zoo"),  # an adjective to HanTa
        ("a cup and its remote", "cup remote"),
        ("the very first husky, a ferret and a dog", "husky ferret dog"),
        ("a black and white dog", "dog"),
        ("a big, red dog", "dog"),
        ("the dog is red", "dog"),
        ("2 dogs 😀 x _ .", "dog"),
        ("", ""),
    ],
)
def test_hanta_finds_the_nouns_of_captions(text: str, nouns: str):
    assert [noun.lemma for noun in HantaTagger().nouns(text)] == nouns.split()


def test_a_noun_stands_where_the_tagger_says():
    text = "The man\u2019s T-shirt \u2013 two  dogs"
    assert [text[n.start : n.stop] for n in HantaTagger().nouns(text)] == ["man", "T-shirt", "dogs"]


def test_a_noun_cut_by_the_end_of_the_text_is_given_as_written():
    assert Toy(["A", " dog", " on", " a", " surf", "bo"]).nouns() == [("dog", (1,)), ("surfbo", (4, 5))]


def test_a_word_of_thousands_of_letters_takes_no_time():
    began = time.perf_counter()
    HantaTagger().nouns("a " + "ab" * 2000)
    assert time.perf_counter() - began < 5


def test_hanta_reads_its_own_model_and_no_file_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "morphmodel_en.pgz").write_bytes(b"not a model")
    monkeypatch.chdir(tmp_path)
    hanta.cache_clear()
    assert HantaTagger().nouns("a dog") == [Noun(2, 5, "dog")]


def test_hanta_is_loaded_once(monkeypatch: pytest.MonkeyPatch):
    HantaTagger().nouns("a dog")
    monkeypatch.delattr(HanoverTagger, "HanoverTagger")
    assert HantaTagger().nouns("a cat") == [Noun(2, 5, "cat")]


def test_nouns_of_the_prefix_are_dropped_and_the_others_stay_in_place():
    toy = Toy([" a", " dog", " near", " an", " image", "."])
    assert toy.nouns() == [("dog", (1,)), ("image", (4,))]
    assert toy.nouns(answer_prefix="An image of") == toy.nouns()
    assert toy.nouns(answer_prefix="An image of ") == toy.nouns()


def test_the_prefix_gives_context():
    toy = Toy(["face", "."])
    assert toy.nouns(answer_prefix="Two dogs can") == []
    assert toy.nouns(answer_prefix="An image of a") == [("face", (0,))]


@dataclass
class Says:
    """A tagger that says what it is told to."""

    said: list[Noun]

    def nouns(self, text: str) -> list[Noun]:
        return self.said


def test_a_noun_that_no_token_wrote_is_left_out_and_shifts_no_other():
    toy = Toy(["A", " dog", " and", " a", " cat"])
    said = [Noun(0, 0, "empty"), Noun(12, 15, "cat"), Noun(12, 44, "beyond"), Noun(2, 5, "dog"), Noun(-3, 1, "before")]
    found = find_nouns(toy.caption, toy.ids, toy.decode, tagger=Says(said))
    assert found == [Word("dog", "dog", 2, 5, (1,)), Word("cat", "cat", 12, 15, (4,))]


def test_white_space_around_the_text_shifts_nothing():
    toy = Toy(["\n", " ", " A", " dog", " ", "\n"])
    assert find_nouns("A dog", toy.ids, toy.decode) == [Word("dog", "dog", 2, 5, (3,))]
    assert find_words("a", "A dog", toy.ids, toy.decode) == [Word("A", "a", 0, 1, (2,))]


@pytest.mark.parametrize("find", [find_nouns, lambda *args: find_words("dog", *args)], ids=["nouns", "words"])
def test_a_caption_of_other_tokens_is_refused(find: Callable[..., list[Word]]):
    toy = Toy(["USER:", " A", " dog"])
    with pytest.raises(WordError) as caught:
        find("A dog", toy.ids, toy.decode)
    assert str(caught.value) == (
        "The caption is not what its tokens decode to.\n"
        "The caption is 'A dog',\nthe tokens say 'USER: A dog'.\n"
        "Pass caption=decode(token_ids).strip(), and only the tokens generated, not those of the prompt."
    )


# ---- words asked for

HOT_DOGS = Toy(
    ["Two", " Hot", " dogs", " and", " a", " dog", " sit", "s", " on", " dog", "gy", " hot", "-", "dog", "."]
)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (["dog"], [("dogs", (2,)), ("dog", (5,))]),  # neither "doggy" nor "hot-dog"
        (["DOGS"], [("dogs", (2,)), ("dog", (5,))]),
        (["hot dog"], [("Hot dogs", (1, 2))]),
        ([" hot  dogs "], [("Hot dogs", (1, 2))]),
        (["hot-dog"], [("hot-dog", (11, 12, 13))]),
        (["on", "two"], [("Two", (0,)), ("on", (8,))]),  # no nouns, in order of appearance
        (["dog", "dogs", "a dog"], [("dogs", (2,)), ("a dog", (4, 5)), ("dog", (5,))]),
        ([], []),
    ],
)
def test_words_asked_for(wanted: list[str], found: list[tuple[str, tuple[int, ...]]]):
    assert HOT_DOGS.words(*wanted) == found


def test_a_word_found_is_the_noun_found():
    args = HOT_DOGS.caption, HOT_DOGS.ids, HOT_DOGS.decode
    assert [w for w in find_nouns(*args) if w.lemma == "dog"] == find_words("dog", *args)


def test_accents_and_apostrophes_match_however_they_are_written():
    toy = Toy(["The", " cafe\u0301", "\u2019s", " door"])
    assert toy.words("caf\u00e9's door") == [("cafe\u0301\u2019s door", (1, 2, 3))]


def test_a_phrase_does_not_reach_over_a_comma():
    with pytest.raises(WordError):
        Toy(["hot", ",", " dog"]).words("hot dog")


@pytest.mark.parametrize(
    ("text", "wanted", "found"),
    [
        ("草地上有一只狗和一只猫。", "狗", ["狗"]),
        ("草地上有一只狗和一只猫。", "一只", ["一只", "一只"]),
        ("路边的消火栓", "消火栓", ["消火栓"]),
        ("穿T恤的人", "t恤", ["T恤"]),
        ("一只dog", "dog", ["dog"]),
        ("芝生の上の犬とネコ", "ネコ", ["ネコ"]),
        ("芝生の上の犬とネコ", "芝生", ["芝生"]),
        ("パンダとパン", "パン", ["パン"]),  # bread, and not the panda's
        ("ﾊﾟﾝとか\u3099く", "パン", ["ﾊﾟﾝ"]),
        ("か\u3099く", "がく", ["か\u3099く"]),
        ("개가 잔디 위에 있다", "개", ["개"]),
        ("소파 위의 고양이들과 개나리, 개입니다", "개", ["개"]),
        ("소파 위의 고양이들과 개", "고양이", ["고양이"]),
        ("빨간 소화전에서", "빨간 소화전", ["빨간 소화전"]),
        ("สุนัขและแมวบนหญ้า", "แมว", ["แมว"]),
        ("घास पर एक कुत्ता", "कुत्ता", ["कुत्ता"]),
        ("Собака и кошки", "собака", ["Собака"]),
        ("un chien dans l'herbe", "herbe", ["herbe"]),
        ("un chien dans l\u2019Herbe", "herbe", ["Herbe"]),
        ("un cane sull'erba", "erba", ["erba"]),
        ("un cane sull'erba", "sull'erba", ["sull'erba"]),
        ("el perro está", "está", ["está"]),
        ("Zwei Hunde auf der Wiese", "wiese", ["Wiese"]),
        ("the dog\u02bcs bowl", "dog", ["dog"]),
        ("a sign 'dog'", "dog", ["dog"]),
        ("a dog--a cat", "dog", ["dog"]),
    ],
)
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, LLAMA], ids=["byte-level BPE", "Llama"])
def test_words_are_found_in_any_script_on_the_tokens_of_their_bytes(
    tokenizer: Tokenizer, text: str, wanted: str, found: list[str]
):
    ids = tokenizer.encode(text).ids
    words = find_words(wanted, text, ids, tokenizer.decode)
    assert [w.text for w in words] == found
    assert [text[w.start : w.stop] for w in words] == found
    assert [tokenizer.decode([ids[step] for step in w.steps]).strip() for w in words] == found


def test_a_token_that_ends_one_character_and_begins_the_next_wrote_both():
    dog, cat = "狗".encode(), "猫".encode()
    toy = Toy(["有", dog[:2], dog[2:] + cat[:1], cat[1:2], cat[2:] + "。".encode()])
    assert toy.caption == "有狗猫。"
    assert toy.words("狗") == [("狗", (1, 2))]
    assert toy.words("猫") == [("猫", (2, 3, 4))]
    assert toy.words("狗猫") == [("狗猫", (1, 2, 3, 4))]


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("パンダ", "パン"),
        ("フライパン", "パン"),
        ("개나리", "개"),  # another flower
        ("कुत्ता", "कुत"),
        ("five o'clock", "clock"),
        ("狗和猫", "狗猫"),
    ],
)
def test_a_part_of_a_word_is_not_found(text: str, phrase: str):
    assert not says(text, phrase)


# ---- languages

ENGLISH = """
a zorblat | surfboard | husky | an okapi and a dik-dik | giraffe, rhinoceros, eggplant, kiwi | Two corgis frolic
pad thai | sushi and sashimi | crème brûlée | a crème brûlée and an espresso macchiato | piñata | Los Angeles
a surfbo | a hat | die | San Francisco at night | a bust of Ludwig van Beethoven | kimchi jjigae
Lamborghini Huracán | wolf | hors d'oeuvres | yes | a bánh mì sandwich | Husky, Samoyed, Akita
tyrannosaurus rex | a sign that says 'Café de la Paix' | a sign that says "停车场"
"""
FOREIGN = """
un perro y un gato en la hierba | un perro | el perro de la casa | Un hombre monta en bicicleta por la calle
un chien et un chat sur l'herbe | un chien | un cane e un gatto sull'erba | um cachorro e um gato na grama
Ruskea koira istuu nurmikolla punaisen pallon vieressä | Mbwa wa kahawia ameketi kwenye nyasi
Txakur marroia belarrean eserita dago | Deux chats noirs dorment
pies i kot na trawie | en hund och en katt på gräset | en hund og en kat på græsset | koira ja kissa nurmikolla
çimenlerin üzerinde bir köpek ve bir kedi | con chó và con mèo trên cỏ | seekor anjing dan kucing di atas rumput
pes a kočka na trávě | 草地上有一只狗和一只猫。 | 狗 | 芝生の上の犬とネコ | 개가 잔디 위에 있다
собака и кошка на траве | كلب وقطة | घास पर एक कुत्ता | สุนัขและแมว | 一只 dog 和一只猫在草地上
"""


def texts(of: str) -> list[str]:
    return [text.strip() for line in of.strip().splitlines() for text in line.split("|")]


@pytest.mark.parametrize("text", texts(ENGLISH))
def test_english_is_taken_for_english(text: str):
    assert tagger_for(text) == HantaTagger("en")


@pytest.mark.parametrize("text", texts(FOREIGN))
def test_a_language_without_a_tagger_has_no_nouns(text: str):
    assert tagger_for(text) is None
    assert Toy([text]).nouns() == []
    assert Toy([text]).nouns(answer_prefix="An image of") == []


@pytest.mark.parametrize(
    ("text", "language", "nouns", "lemmas"),
    [
        ("Ein Hund und zwei Katzen auf der Wiese", "de", "Hund Katzen Wiese", "hund katze wiese"),
        ("ein Hund", "de", "Hund", "hund"),
        ("Eine rote Blume in einer Vase", "de", "Blume Vase", "blume vase"),
        ("een hond en twee katten op het gras", "nl", "hond katten gras", "hond katten gras"),
    ],
)
def test_german_and_dutch_have_taggers(text: str, language: str, nouns: str, lemmas: str):
    assert tagger_for(text) == HantaTagger(language)  # type: ignore[arg-type]
    found = find_nouns(text, [0], Toy([text]).decode)
    assert [w.text for w in found] == nouns.split()
    assert [w.lemma for w in found] == lemmas.split()


def test_words_of_another_script_are_no_english_nouns():
    assert Toy(['a sign that says "停车场" and a dog สุนัข']).nouns() == [("sign", (0,)), ("dog", (0,))]


def test_spacy_tells_nouns(monkeypatch: pytest.MonkeyPatch):
    words = [("一只", "NUM", ""), ("狗", "NOUN", "狗"), ("和", "CCONJ", ""), ("Berlin", "PROPN", "Berlin")]

    def load(name: str) -> Callable[[str], list[SimpleNamespace]]:
        if name == "none":
            raise OSError("[E050] Can't find model 'none'.")
        return lambda text: [
            SimpleNamespace(text=word, idx=text.index(word), pos_=kind, lemma_=lemma) for word, kind, lemma in words
        ]

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    toy = Toy(["一只", "狗", "和", "Berlin"])
    tagger = SpacyTagger("zh_core_web_sm")
    found = find_nouns(toy.caption, toy.ids, toy.decode, tagger=tagger)
    assert [(w.text, w.lemma, w.steps) for w in found] == [("狗", "狗", (1,)), ("Berlin", "berlin", (3,))]
    with pytest.raises(SettingError, match="python -m spacy download none"):
        SpacyTagger("none")
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(SettingError, match=r"mmneurons\[spacy\]"):
        SpacyTagger("es_core_news_sm")


@pytest.mark.parametrize("wanted", ["do", "surfboard", "dog cat", "  ", ""])
def test_a_word_not_there_is_refused_with_the_caption_and_a_way_out(wanted: str):
    toy = Toy(["A", " dog", "."])
    with pytest.raises(MmneuronsError) as caught:
        toy.words("dog", wanted, "horse")
    assert str(caught.value) == (
        f"Not in the caption: '{wanted}', 'horse'.\n"
        "The caption is 'A dog.'.\n"
        "Ask for whole words that it has, spelled as it spells them; or for none, to take its nouns."
    )


@pytest.mark.parametrize(
    "pairs",
    [
        "dogs dog buses bus glasses glass foxes fox dishes dish churches church quizzes quiz axes axe caches cache",
        "babies baby skies sky pies pie cookies cookie monkeys monkey",
        "men man women woman snowmen snowman children child feet foot teeth tooth geese goose mice mouse sheep sheep",
        "knives knife wives wife leaves leaf shelves shelf wolves wolf lives life olives olive sleeves sleeve",
        "potatoes potato shoes shoe toes toe photos photo canoes canoe",
        "houses house vases vase horses horse walruses walrus rhinoceroses rhinoceros lenses lens tortoises tortoise",
        "skis ski taxis taxi tennis tennis cactus cactus gas gas grass grass species species scissors scissors",
        "zebras zebra giraffes giraffe ostriches ostrich ostrich ostrich skateboarder skateboarder T-shirts t-shirt",
        "is is this this DOGS dog",
    ],
)
def test_singular(pairs: str):
    asked, expected = pairs.split()[::2], pairs.split()[1::2]
    assert [singular(word) for word in asked] == expected


def test_singular_of_a_phrase_is_that_of_its_last_word():
    assert singular("Teddy bears") == "teddy bear"
    assert singular("hot dogs  stand") == "hot dogs stand"


@given(st.text(max_size=30) | st.lists(st.sampled_from(["a", "Dogs", "'s", "n't", "-", "😀", "İ", "x"])).map("".join))
def test_any_text_can_be_tagged(text: str):
    for start, stop, lemma in HantaTagger().nouns(text):
        assert singular(text[start:stop]) == lemma


def test_what_counts_as_the_same_stem():
    for noun, token in [("dog", " Dogs"), ("boat", " boats"), ("elephant", " eleph"), ("swim", "swimming")]:
        assert same_stem(noun, token, "x")
    assert same_stem("dolphin", " dol", " dol")
    assert not same_stem("dolphin", " dol", " d")
    for noun, token in [("car", " card"), ("dog", " do"), ("cat", "cat1"), ("boat", " boa"), ("pear", " peak")]:
        assert not same_stem(noun, token, "x")
