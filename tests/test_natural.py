"""Natural writing of text that was published in lower case with spaces around punctuation."""

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from prepare.natural import PROPER_NOUNS, natural

LINES = (ROOT / "tests/natural.tsv").read_text(encoding="utf-8").splitlines()[1:]

# what people write, with and without capitals, among them what a careless rule would change
NATURAL = """Hi, I'm good. And you?
I have an iPhone, an iPad and a MacBook.
iPhone or Android? I can't decide...
e.g. U.S. Route 66, i.e. the road to L.A.
Wait... what? No!! Really?!
She said "hi there" and left.
'Tis the season; don't forget.
It was 8:30 p.m. when Mr. Smith called.
That's $3.50, or 5% of 1,250.75 (I think).
See https://www.example.org/a.b?c=d&e=f :)
Email me at jo.doe@example.com ;)
lol :( that's sad, Bob
The dogs' bowls are empty; James's isn't.
I'm 5'10" tall - not bad, eh?
Rock 'n' roll ain't dead , she wrote .
A self-employed T-shirt seller (from NYC)
He/she turned 21 on 3/4/2020.
What's the Ph.D. worth? $100K?
OK . . . fine
its a Test of "its" and dont
Ich bin Käse-Fan. Él está aquí. Ça va?
Use `i = i + 1` in C++; it's O(n).
3.5 stars -- I'd give it 4!
@Bob #NoFilter <3 XD
Is turkey eaten in Turkey? Will Will mark Mark?
LOUD NOISES !
The U.S. economy... the U.K. one, too.
no cap, said Tim
"Quoted." "Twice," I said.
He's 6 ft. 2 in. and weighs 180 lbs.
We  like  double  spaces. Yes.
I've been to St. Louis, D.C. and N.Y.
Tabs\tand more: A, B & C"""


def letters(text):
    return [c for c in text.lower() if c.isalnum()]


@pytest.mark.parametrize("line", LINES)
def test_validation_lines_are_written_as_an_editor_writes_them(line):
    published, edited = line.split("\t")
    assert natural(published) == edited
    assert letters(published) == letters(edited)


def test_there_are_200_such_lines():
    assert len(set(LINES)) == 200


@pytest.mark.parametrize("text", NATURAL.splitlines())
def test_natural_text_is_returned_unchanged(text):
    assert natural(text) == text


@pytest.mark.parametrize(
    "published, expected",
    [
        ("", ""),
        ("i ' m sure they do n't . ca n't you ?", "I'm sure they don't. Can't you?"),
        ("i m ok , don t worry . we ll see", "I'm ok, don't worry. We'll see"),
        ("dont say im late . thats it", "Don't say I'm late. That's it"),
        ("i feel ill . well , we were fed", "I feel ill. Well, we were fed"),
        ("its a cat . i like its fur . its cold .", "It's a cat. I like its fur. It's cold."),
        ("bad habits good habits . it lets me go", "Bad habits good habits. It lets me go"),
        ("wow ! ! what ? ! no . . . yes . . ok", "Wow!! What?! No... yes.. ok"),
        ("i pay $ 3 . 50 , or 5 % , of 50 , 000", "I pay $3.50, or 5%, of 50,000"),
        ("numbers 1 , 2 , 3 at 8 : 30 p . m . or so", "Numbers 1, 2, 3 at 8:30 p.m. or so"),
        ('he said " hi " ( twice ) : ok ; bye : )', 'He said "hi" (twice): ok; bye :)'),
        ('she said " i \' m 5 . " ok', 'She said "I\'m 5." Ok'),
        ("she is self - employed - i think", "She is self-employed - I think"),
        ("i am from the u . s . , you ?", "I am from the U.S., you?"),
        ("i work at dr . smith ' s office .", "I work at Dr. Smith's office."),
        ("she is a dr . she works", "She is a dr. She works"),
        ("hi mark ! mark my words", "Hi Mark! Mark my words"),
        ("my name is rusty , my dog ' s name is max", "My name is Rusty, my dog's name is Max"),
        ("my name is difficult , not important", "My name is difficult, not important"),
        ("mr strange is here", "Mr Strange is here"),
        ("i ford the river in a ford", "I ford the river in a Ford"),
        ("from chevy to ford", "From Chevy to Ford"),
        ("may i eat turkey off china in may ?", "May I eat turkey off china in May?"),
        ("i love new york and game of thrones", "I love New York and Game of Thrones"),
        ("iphone or tv ?", "iPhone or TV?"),
        ("joe drinks a cup of joe", "Joe drinks a cup of joe"),
        ("lol ok", "Lol ok"),
    ],
)
def test_published_writing_becomes_natural(published, expected):
    assert natural(published) == expected


TOKENS = (
    "i m s t ' 'm n't don dont its lets a an . , ! ? ; : ( ) \" - / $ % # 3 50 000 8 30 p u e dr mr"
    " pepper my name is bob named new york in la us hi will iphone www.x.org :) ß é co self"
)
tokens = st.sampled_from(TOKENS.split())


@settings(deadline=None)
@given(
    st.text()
    | st.text(alphabet="ai' .,!?\"()-:;3ms")
    | st.lists(tokens).map(" ".join)
    | st.lists(tokens).map("".join)
)
def test_no_letter_changes_and_twice_is_once(text):
    once = natural(text)
    assert letters(once) == letters(text)
    assert natural(once) == once


def test_proper_nouns_are_sorted_and_unique():
    assert sorted(PROPER_NOUNS, key=lambda form: (form.lower(), form)) == PROPER_NOUNS
    assert len({form.lower() for form in PROPER_NOUNS}) == len(PROPER_NOUNS)
