"""Measures what a token costs a host: tokenisers and a guard of regular expressions, single-threaded, on this machine.

    python -m venv tok && tok/bin/pip install tiktoken tokenizers
    npm pack tiktoken && tar xzf tiktoken-*.tgz          # the vocabularies, as package/encoders/*.json
    tok/bin/python studies/tokenizer_rates.py --vocabulary package/encoders/cl100k_base.json

The text is Python's own reference and docstrings of its standard library. Prints ns per token, of requests of about
2,000, and ns per request, what one of four tokens takes beyond these, of encoding and decoding with tiktoken, and with
`tokenizers`, whose vocabulary is trained on the same text, whole and streamed token by token; then of scanning for a
list of patterns. It needs nothing of MIST and changes nothing: the defaults of the performance model `cpu_text` are its
figures, rounded.

Measured on one core of an AMD EPYC (family 25, model 17: Zen 4; a virtual machine), Python 3.11.7, ns per token:

| | encode | decode |
| --- | --- | --- |
| tiktoken 0.14.0, cl100k_base | 240 to 310 | 34 to 42 |
| tokenizers 0.23.3, BPE of 16,368 | 1,240 to 1,710 | 144 to 155; streamed 620 to 920 |

and 1,330 to 1,410 per token of text for 16 patterns; below 10 us a request for any of them.
"""

from __future__ import annotations

import argparse
import ast
import base64
import json
import os
import platform
import re
import statistics
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

#: from a text or from tokens
Work = Callable[[Any], Any]
Tokeniser = tuple[str, Work, Work]

#: what an input guard looks for: addresses, numbers of cards and accounts, keys, and ways to talk a model round
GUARD_PATTERNS = [
    r"[\w.+-]+@[\w-]+\.[\w.]+", r"\b(?:\d[ -]?){13,16}\b", r"\b\d{3}-\d{2}-\d{4}\b", r"\+?\d[\d ()-]{8,}\d",
    r"\b(?:\d{1,3}\.){3}\d{1,3}\b", r"\b[A-Z]{2}\d{2}[A-Z0-9]{11,30}\b", r"\bAKIA[0-9A-Z]{16}\b",
    r"\bgh[pousr]_[A-Za-z0-9]{36}\b", r"-----BEGIN [A-Z ]*PRIVATE KEY-----", r"\beyJ[\w-]+\.[\w-]+\.[\w-]+\b",
    r"(?i)\bignore (?:all |the )?(?:previous|above) instructions\b", r"(?i)\bsystem prompt\b", r"(?i)\bjailbreak\b",
    r"(?i)\bpassword\s*[:=]\s*\S+", r"(?i)\bapi[_-]?key\s*[:=]\s*\S+", r"(?i)<script\b",
]  # fmt: skip
#: tokens of a request, about
LONG, SHORT = 2000, 4
CHARACTERS_PER_TOKEN = 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocabulary", type=Path, help="a JSON vocabulary of the npm package tiktoken")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    text = corpus()
    print(f"{processor()}; Python {platform.python_version()}; {len(text):,} characters")
    print(f"{'what':40}{'ns/token':>10}{'ns/request':>12}{'char/token':>12}")
    for name, encode, decode in (*tiktoken_of(options.vocabulary), *trained(text)):
        measure(f"{name} encode", encode, text, options.repeats)
        measure(f"{name} decode", decode, text, options.repeats, encode)
    patterns = [re.compile(pattern) for pattern in GUARD_PATTERNS]
    measure(
        f"{len(patterns)} patterns, re", lambda t: [p.search(t) for p in patterns], text, options.repeats, counts=False
    )


def corpus() -> str:
    """Python's reference as pydoc has it, then the docstrings of the standard library."""
    from pydoc_data import topics

    parts = [*topics.topics.values()]
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
        parts += [doc for node in ast.walk(tree) if isinstance(node, nodes) and (doc := ast.get_docstring(node))]
    return "\n\n".join(parts)


def measure(name: str, work: Work, text: str, repeats: int, before: Work | None = None, *, counts: bool = True) -> None:
    """Print time per token of long requests and of very short requests, and characters per token.

    Tokens are counted in what `work` returns, or in what it is given where `before` made it; else 4 characters are one.
    """
    ns, tokens = {}, {}
    for size in (LONG, SHORT):
        given: Sequence[Any] = pieces(text, CHARACTERS_PER_TOKEN * size)
        given = [before(piece) for piece in given] if before else given
        sized = given if before else [work(piece) for piece in given] if counts else ["." * size] * len(given)
        tokens[size] = sum(map(len, sized)) / len(given)
        ns[size] = 1e9 * statistics.median(timed(work, given) for _ in range(repeats)) / len(given)
    per_token = ns[LONG] / tokens[LONG]
    fixed = max(0.0, ns[SHORT] - per_token * tokens[SHORT])
    print(f"{name:40}{per_token:10.0f}{fixed:12.0f}{CHARACTERS_PER_TOKEN * LONG / tokens[LONG]:12.2f}")


def pieces(text: str, size: int) -> list[str]:
    """Up to 200 requests of `size` characters, from all over the text."""
    step = max(size, len(text) // 200)
    return [text[at : at + size] for at in range(0, len(text) - size, step)]


def timed(work: Callable[[Any], Any], requests: Sequence[Any]) -> float:
    """CPU seconds of this thread, so that others on the machine don't count."""
    began = time.thread_time()
    for request in requests:
        work(request)
    return time.thread_time() - began


def tiktoken_of(path: Path | None) -> list[Tokeniser]:
    """tiktoken with a vocabulary of its npm package: lines of "! first-rank token token ...", tokens in base64."""
    if path is None:
        return []
    import tiktoken

    data = json.loads(path.read_text())
    ranks: dict[bytes, int] = {}
    for line in data["bpe_ranks"].splitlines():
        _, first, *tokens = line.split()
        ranks |= {base64.b64decode(token): int(first) + i for i, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(
        path.stem, pat_str=data["pat_str"], mergeable_ranks=ranks, special_tokens=data["special_tokens"]
    )
    return [(f"tiktoken {tiktoken.__version__} {path.stem}", encoding.encode_ordinary, encoding.decode)]


def trained(text: str) -> list[Tokeniser]:
    """A byte-level BPE of the package tokenizers, trained here."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        pieces(text, 4096), trainers.BpeTrainer(vocab_size=32_000, show_progress=False, initial_alphabet=alphabet)
    )
    name = f"tokenizers {tokenizers.__version__} BPE {bpe.get_vocab_size():,}"

    def stream(tokens: list[int]) -> None:
        """As a server that streams does it: token by token."""
        decoder = decoders.DecodeStream(skip_special_tokens=False)
        for token in tokens:
            decoder.step(bpe, token)

    encode: Work = lambda piece: bpe.encode(piece).ids  # noqa: E731
    return [(name, encode, bpe.decode), (f"{name} streamed", encode, stream)]


def processor() -> str:
    """The processor's name as the system gives it."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if os.name == "posix" else None
    return found.group(1) if found else platform.processor()


if __name__ == "__main__":
    main()
