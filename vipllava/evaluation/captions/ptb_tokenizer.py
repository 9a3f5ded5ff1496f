r"""Tokens of captions as CIDEr and METEOR are published on: Penn Treebank style, in Python.

Written after the behaviour of Stanford's PTBTokenizer 3.4.1 (a Java program) with the options that
pycocoevalcap gives it, ``-preserveLines -lowerCase``, and compared with it: of 5,000 captions of
Flickr8k and 1,100 texts of models none has other tokens, of 20,000 captions with punctuation put
in at random places 0.4 % have. It reads each caption alone; the Java program reads a file of them
and looks over their ends, so that `vitamin C.` loses its full stop where the next one begins with
`The`.

At each place the longest kind of token wins. What stands after group 1 of a kind's pattern counts
as length and is not taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

PUNCTUATION: Final = frozenset("'' ' `` ` . ? ! , : - -- ... ;".split())
"""Tokens that are left out. pycocoevalcap means to leave out brackets, too, but spells them in
upper case: `-lrb-`, for `(`, is scored, and so it is in published figures."""

_LEFT_OUT: Final = PUNCTUATION | set('"\u2018\u2019\u201b\u201c\u201d\u00ab\u00bb\u2039\u203a\u2013'
                                     '\u2014\u2015\u2026') | {"&quot;", "&apos;"}  # fmt: skip
_WRITTEN: Final = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "\u00a2": "cents", "\u00a3": "#", "\u00a4": "$", "\u20a0": "$", "\u20ac": "$",
    "\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3",
    "&amp;": "&", "&lt;": "<", "&gt;": ">",
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na",
    "lemme": "lem me", "gimme": "gim me", "'tis": "'t is", "'twas": "'t was",
}  # fmt: skip
_NO_TOKEN: Final = re.compile(
    r"[\u02c2-\u02ff\u2000-\u2015\u2024\u2025\u2027-\u202f\u203c\u203d\u2043\u2045-\u206f"
    r"\u20a1-\u20a3\u20a5-\u20ff\u2150-\u2152\u215f-\u218f\u2c00-\u3000\u3003-\u3011\u3013-\ufeff"
    r"\uffe2-\uffe4\uffe8-\uffff]|[^\0-\uffff]"
)
"""Signs that are passed over, most emoji among them."""

_ABBREVIATIONS: Final = """
mr mrs ms miss messrs dr drs prof gen lt sgt capt col cpl pvt maj cmdr comdr adm brig gov govs pres
sen sens rep reps rev hon supt insp ens msgr mme mlle pfc spc sr jr bros md esq ph st ste mt ft rd
ave blvd sq ct bldg est univ assn assoc asst atty dept natl intl treas elec mfg corp co cos inc ltd
plc bhd cie wm jos alex vs cf etc al ext tel rt jan feb mar apr jun jul aug sep sept oct nov dec mon
tue tues wed thu thurs fri ala ariz calif colo conn fla ga ind kan kans ky mich minn mo mont neb nev
okla penn tenn va vt wisc wis wyo dak
""".split()
"""They keep their full stop, and the next ones do so in this spelling or before a number."""
_STATES: Final = "Ark AZ Az Del DEL Ill ILL La LA Mass MASS Ore ORE Pa PA Tex TEX Wash WASH".split()
_BEFORE_NUMBERS: Final = "no nos art pp fig figs ca op".split()
_STARTERS: Final = """
A About According Additionally After An As At But Earlier He Her Here However If In It Last Many
More Now Once One Other Our She Since So Some Such That The Their Then There These They This We What
When While Yet You
""".split()
"""Words before which a letter and a full stop end a sentence, as in `vitamin C. The`, so written or
in capitals."""
_WHOLE: Final = """
ma'am o'clock c'mon s'mores? e'er cap'n nat'l qu'est somethin' dunkin' ol'(?![A-Za-z]) d'ye 'em
'till? 'cause '[2-9]0s
""".split()
"""Words with an apostrophe that stay whole, beyond those that a rule below describes."""

_Q: Final = "['\u2019]"
_SMALL: Final = "\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209f\u2150-\u218f\u2460-\u249b"  # digits
_MARK: Final = r"(?!\w)[\u0300-\u036f\u0901-\u0d4d]"  # accents and vowels after their letter
_LETTER: Final = rf"(?:[^\W\d_{_SMALL}]|{_MARK})"
_ANY: Final = rf"(?:[^\W_{_SMALL}]|{_MARK})"  # a letter or digit
_PART: Final = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"  # of what slashes join
_ENDING: Final = "(?i:s|m|d|re|ve|ll)"  # after an apostrophe
_ATTRIBUTE: Final = r"[A-Za-z][\w:.-]*(?: ?= ?(?:\"[^\"<>]*\"|'[^'<>]*'|[\w:.-]+))?"
_URL: Final = r"[^ <>\"|()]*[^ <>\"|().,!?;:'-]"


def _any_of(words: Iterable[str]) -> str:
    return "|".join(words).replace("'", _Q)


_STARTER: Final = _any_of([*_STARTERS, *map(str.upper, _STARTERS)])
_KINDS: Final = tuple(
    re.compile(pattern)
    for pattern in (
        rf"{_LETTER}{_ANY}*(?:[.!?]{_LETTER}{_ANY}*)*",
        rf"{_ANY}+",
        r"[-+]?[.,:]?\d+(?:[.,:]\d+)*",
        # contractions: `do` of `don't`, `n't`, `'s`
        rf"({_LETTER}*(?![nN]){_LETTER})(?i:n['\u2019`]t)(?!{_LETTER})",
        r"(?i:n['\u2019`]t)(?![A-Za-z])",
        rf"'{_ENDING}(?![A-Za-z])|\u2019{_ENDING}",
        rf"[dDlLjJ]{_Q}(?!{_ENDING}(?![A-Za-z]))|[yY]{_Q}(?=[A-Za-z])",
        r"(?i:'tis|'twas)(?![A-Za-z])",
        # words with an apostrophe: `o'clock`, `'n'`, `'98`, `O'Brien`, `Hawai'i`
        rf"(?i:{_any_of(_WHOLE)})|{_Q}[nN](?:{_Q}|(?!{_ANY}))|{_Q}\d\d(?= |$)",
        rf"(?:[A-HJ-XZ]|[dlno]){_Q}[A-Za-z]{{2,}}",
        rf"[A-Za-z]+(?i:[aeiouy]){_Q}(?!{_ENDING}(?![A-Za-z]))[aeiouA-Z][A-Za-z]*",
        # compounds: `20-year-old`, `1,000-mile`, `U.S.-made`, `his/her`, `t-shirt/top`, `file_name`
        rf"{_ANY}(?:{_ANY}|[.,])*(?:-(?:(?:[A-Za-z]\.){{2,}}|{_ANY}+))+",
        rf"{_PART}(?:/{_PART}){{1,2}}",
        r"[A-Za-z0-9]+(?:_[A-Za-z0-9]+)+",
        r"[A-Z]+(?:[&+][A-Z]+)+",
        # full stops that belong to the token
        rf"(?i:{_any_of(_ABBREVIATIONS)})\.|(?:{_any_of(_STATES)})\.",
        rf"((?i:{_any_of(_BEFORE_NUMBERS)})\.) ?\d",
        rf"(?:[A-Za-z]\.){{2,}}|[A-Za-z]\.(?! (?:{_STARTER})(?: |$))|(?i:ph\.d\.)",
        rf"({_ANY}+(?:-{_ANY}+)*\.)[,;:]",
        # numbers: `10 1/2`, telephones
        r"\d{1,4}[- ]\d{1,4}/\d{1,4}|\d{1,2}/\d{1,2}/\d{2,4}",
        r"(?:\(\d{2,3}\) ?|\+?(?:\d{2,4}[- ])?\d{2,4}[- ])\d{3,4}[- ]?\d{3,5}",
        # addresses, users, tags, SGML
        rf"https?://{_URL}|(?:[A-Za-z0-9-]+\.)+(?:com|net|org|edu)/{_URL}",
        r"[A-Za-z0-9][^ \"<>|()]{0,99}@(?:[^ \"<>|().]+\.)*[^ \"<>|().]+|@[A-Za-z_]\w*|#[A-Za-z]+",
        rf"<[\w.+-]+@[\w.-]+>|</?[A-Za-z][\w:.-]*(?: {_ATTRIBUTE})* ?/?>|<[!?][A-Za-z-][^<>]*>",
        # signs of more than one character, smileys
        r"&(?i:amp|lt|gt|quot|apos);|[Cc]\+\+|[CcFf]#|[A-Z]+\$",
        r"[?!]+|-{2,}|_+|\*+|\.{2,}|\#{2,}|<<|>>|''|``",
        r"[<>]?[:;=][o*'-]?[()\[\]DPdpO|{@\\](?![A-Za-z0-9])|\^_\^|-_-",
    )
)
_PLAIN: Final = re.compile(r"[A-Za-z]+(?= |$)")
"""A word between blanks, which no other kind can be longer than: most tokens of a caption."""


def tokenize(caption: str) -> str:
    """Return the tokens of ``caption`` in lower case, without punctuation, joined by blanks."""
    text = " ".join(caption.replace("\u00ad", "").split())
    tokens: list[str] = []
    start = 0
    while start < len(text):
        plain = _PLAIN.match(text, start)
        token = plain.group() if plain else _longest(text, start)
        start += len(token)
        if written := _written(token.lower()):
            tokens.append(written)
    return " ".join(tokens)


def _longest(text: str, start: int) -> str:
    best, length = text[start], 1
    for kind in _KINDS:
        found = kind.match(text, start)
        if found and found.end() - start > length:
            length = found.end() - start
            best = found.group(1) if found.lastindex else found.group()
    return best


def _written(token: str) -> str:
    """Return what is written for a token in lower case; nothing if it is left out."""
    if token in _LEFT_OUT or token == " ":
        return ""
    if written := _WRITTEN.get(token):
        return written
    if len(token) == 1:
        return "" if _NO_TOKEN.match(token) and not token.isalnum() else token
    if token[0] in "-." and len(set(token)) == 1:  # longer rules of dashes are a token
        return token if token[0] == "-" and len(token) > 4 else ""
    if token[0] in "<>:;=(":  # smileys, telephones
        token = token.replace("(", "-lrb-").replace(")", "-rrb-")
    elif (token[0] == "\u2019" and re.fullmatch(_ENDING, token[1:])) or token == "n\u2019t":
        token = token.replace("\u2019", "'")
    return token.replace(" ", "\u00a0")  # METEOR takes `555 1234` for one word
