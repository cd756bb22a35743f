"""Recognise secrets by name and by value, so that none is written into a spec and from there into run folders.

Recognition by value cannot be complete. It knows the published forms of tokens, passwords in URLs and connection
strings, and long random words. A variable with the value null is always safe: only its name is written.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter

SECRET_NAME = re.compile(
    r"(?<!_P)KEY|TOKEN(?!IZER)|SECRET|PASS(?!IVE)|CREDENTIAL|COOKIE|BEARER|(^|_)(PAT|PWD|AUTH|JWT|DSN)(_|$)",
    re.IGNORECASE,
)
"""Names of variables whose values must not appear in files or messages (not NCCL_IB_PKEY and TOKENIZERS_...)."""

_FORMS = {
    "a token of GitHub": r"\b(gh[oprsu]_|github_pat_)\w{16,}",
    "a token of GitLab": r"\bglpat-[\w-]{16,}",
    "a token of Hugging Face": r"\b(hf|api_org)_[A-Za-z0-9]{16,}",
    "a key of AWS": r"\b(AKIA|ASIA)[A-Z0-9]{12,}",
    "a key of Google": r"\bAIza[\w-]{30,}",
    "a key of W&B": r"\b(wandb_v\d+_\w{20,}|local-[0-9a-f]{40})",
    "a token of Slack": r"\bxox[a-z]-[\w-]{10,}",
    "a token of npm or PyPI": r"\b(npm_[A-Za-z0-9]{20,}|pypi-[\w-]{16,})",
    "a secret key (sk-, sk_live_)": r"\b(sk-|(sk|rk|pk)_(live|test)_)[\w-]{16,}",
    "a JSON web token": r"\beyJ[\w-]{5,}\.[\w-]{5,}\.[\w-]*",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "an authorization header": r"(?i)\b(bearer|basic|authorization:)\s+\S{8,}",
    "a URL with a password": r"(?i)\b[a-z][a-z0-9+.-]*://[^/\s@]*:[^/\s@]+@",
    "a password or key in a list of settings": (
        r"(?i)(^|[\s;,&?{'\"])\"?(pass(word|wd)?|pwd|(access_?|auth_?)?token|(client_?)?secret|"
        r"(api_?|access_?|account_?|secret_?)key|sig(nature)?)\"?\s*[=:]\s*[^\s;,&]+"
    ),
}
_UUID = re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", re.IGNORECASE)  # names of GPUs, for example
_WORD = re.compile(r"[A-Za-z0-9+]{20,}={0,2}")
_BITS, _CHANGES = 3.0, 0.25
"""Least entropy per character in bits, and least share of changes between kinds of characters, of a random word.

Expected of 32 hexadecimal digits: 3.6 and 0.47; of 40 characters of base64: 4.7 and 0.45. Words of letters in camel
case have fewer changes, because the one after a capital letter does not count.
"""


def secret_form(value: str) -> str | None:
    """What kind of secret the value has the form of, as `a token of GitHub`; None if it looks like none."""
    for name, pattern in _FORMS.items():
        if re.search(pattern, value):
            return name
    if any(_is_random(word[0]) for word in _WORD.finditer(_UUID.sub(" ", value))):
        return "a long random word"
    return None


def _is_random(word: str) -> bool:
    """Whether a word has letters and digits in random order."""
    kinds = ["d" if c.isdigit() else "u" if c.isupper() else "l" for c in word]
    if "d" not in kinds or len(set(kinds)) < 2:
        return False
    changes = sum(a != b and (a, b) != ("u", "l") for a, b in itertools.pairwise(kinds))
    total = len(word)
    bits = -sum(n / total * math.log2(n / total) for n in Counter(word).values())
    return bits >= _BITS and changes >= _CHANGES * total
