"""What the texts themselves look like: markup of templates, refusals, cut ends, repetition, languages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from data_pipelines.card.findings import Check, Section, TableView, grade, judged, share_check
from data_pipelines.card.pairs import PairView
from data_pipelines.words import words
from prefopt.errors import ConfigError

_SIDES = ("chosen", "rejected")
MARKERS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|begin_of_text|>", "<|end_of_text|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<<SYS>>", "<s>", "</s>", "<bos>",
    "<eos>", "<|end_of_turn|>", "<unk>",
)  # fmt: skip
"""Special tokens of the common chat templates, as text."""
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:very |really |so )?sorry,? but|i apologi[sz]e,? but|i(?:'m| am) (?:not able|unable) to|"
    r"i (?:can(?:no|')t|cannot|won't|will not) (?:help|assist|provide|do that|comply|fulfil|answer|support|create|"
    r"generate|write|engage)|as an ai(?: language model)?,? i|i(?:'m| am) just an ai|i must decline|"
    r"(?:it is|it's) not (?:appropriate|ethical) (?:for me )?to)",
    re.IGNORECASE,
)
_OPENING_CHARS = 200
"""A refusal says so at once; further in, the words are usually somebody's story."""
_ENDINGS = tuple(".!?…。！？\"'”’)]}>`*_:;|-—~/0123456789")
_REPEATED_FRAC = 0.2
_NGRAM = 4


class Markers:
    """Special tokens written out in the data: rendered, they are a turn within a turn, or plain noise."""

    def __init__(self, tokens: Iterable[str] = ()) -> None:
        names = sorted({*MARKERS, *(t for t in tokens if len(t) > 2)}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)))
        # Most texts hold none of these, and a search for all names is slow.
        self._initials = sorted({name[0] for name in names})
        self.num_pairs = self.num_marked = 0
        self.found: Counter[tuple[str, str]] = Counter()

    def add(self, pair: PairView) -> None:
        self.num_pairs += 1
        texts = (("prompt", pair.prompt_text), ("chosen", pair.chosen), ("rejected", pair.rejected))
        marked = False
        for where, text in texts:
            if any(initial in text for initial in self._initials):
                for name in set(self._pattern.findall(text)):
                    self.found[(name, where)] += 1
                    marked = True
        self.num_marked += marked

    def check(self) -> Check:
        return share_check(
            "template markup in texts", self.num_marked, self.num_pairs, look=0.0, stop=0.01,
            advice="rows hold special tokens as text. If they were rendered by a template, take the raw turns: "
            "rendered again they would be nested",
        )  # fmt: skip

    def table(self) -> TableView | None:
        rows = tuple((name, where, f"{n:,}") for (name, where), n in self.found.most_common(20))
        return TableView("Markup found", ("token", "in", "pairs"), rows) if rows else None


class Ends:
    """Responses that were cut by a length limit, or look as if they were."""

    def __init__(self) -> None:
        self.num_pairs = 0
        self.known = self.cut = 0
        self.open = dict.fromkeys(_SIDES, 0)

    def add(self, pair: PairView) -> None:
        self.num_pairs += 1
        for side, text, info in zip(_SIDES, (pair.chosen, pair.rejected), pair.info, strict=True):
            if "ended" in info:
                self.known += 1
                self.cut += info["ended"] is False
            self.open[side] += bool(text) and not text.rstrip().endswith(_ENDINGS)

    def checks(self) -> list[Check]:
        shares = {side: count / max(1, self.num_pairs) for side, count in self.open.items()}
        difference = shares["chosen"] - shares["rejected"]
        shown = " and ".join(f"{share:.1%} of {side}" for side, share in shares.items())
        verdict = grade(abs(difference), look=0.1)
        found: list[Check] = [
            judged(
                "unfinished ends", verdict, f"{shown} sides end without punctuation", difference,
                "look where the sides differ by more than 10 points",
                "one side is cut off more often: the pair teaches where to stop, not what to say",
            )
        ]  # fmt: skip
        if self.known:
            found.append(
                share_check(
                    "responses cut by the limit", self.cut, self.known, look=0.02, stop=0.2,
                    unit="sampled responses",
                    advice="raise sample.max_new_tokens, or filter max_unended_frac: 0",
                )
            )  # fmt: skip
        return found


class Refusals:
    """How often each side begins by declining."""

    def __init__(self) -> None:
        self.num_pairs = 0
        self.count = dict.fromkeys(_SIDES, 0)

    def add(self, pair: PairView) -> None:
        self.num_pairs += 1
        for side, text in zip(_SIDES, (pair.chosen, pair.rejected), strict=True):
            self.count[side] += _REFUSAL.search(text, 0, _OPENING_CHARS) is not None

    def check(self) -> Check:
        shares = {side: count / max(1, self.num_pairs) for side, count in self.count.items()}
        gap = shares["chosen"] - shares["rejected"]
        verdict = grade(max(gap, shares["chosen"] - 0.05), look=0.05)
        shown = ", ".join(f"{share:.1%} of {side}" for side, share in shares.items())
        return judged(
            "refusals", verdict, f"{shown} sides begin with one", shares["chosen"],
            "look where more than 10 % of chosen sides refuse, or 5 points more than of rejected ones",
            "the set teaches to decline. On purpose (harmlessness)? Else filter them",
        )  # fmt: skip


def text_section(markers: Markers, ends: Ends, refusals: Refusals) -> Section:
    """All that every row's texts are asked."""
    table = markers.table()
    numbers = {
        "num_with_markup": markers.num_marked,
        "markup": {f"{name} in {where}": n for (name, where), n in markers.found.most_common()},
        "num_refusals": dict(refusals.count),
        "num_without_end": dict(ends.open),
        "num_cut": ends.cut,
    }
    checks = (markers.check(), refusals.check(), *ends.checks())
    return Section("texts", "Texts", checks, numbers, tables=(table,) if table else ())


def repetition_check(sample: Sequence[PairView]) -> tuple[Check, dict[str, float]]:
    """How many sides of a sample repeat themselves: a fifth of their word 4-grams came before."""
    from prefopt.signals.penalties import repeated_frac

    counts = dict.fromkeys(_SIDES, 0)
    for pair in sample:
        for side, text in zip(_SIDES, (pair.chosen, pair.rejected), strict=True):
            # each word by its first place: the signal counts ids
            first: dict[str, int] = {}
            ids = tuple(first.setdefault(word, len(first)) for word in words(text))
            counts[side] += repeated_frac(ids, _NGRAM) > _REPEATED_FRAC
    shares = {side: count / max(1, len(sample)) for side, count in counts.items()}
    verdict = grade(shares["chosen"], look=0.02, stop=0.1)
    check = judged(
        "repetition", verdict, ", ".join(f"{share:.1%} of {side}" for side, share in shares.items()) + " sides",
        shares["chosen"], "look above 2 %, stop above 10 % of chosen sides with a fifth of their 4-grams repeated",
        "the chosen sides teach to repeat: look at them",
    )  # fmt: skip
    return check, shares


def language_section(sample: Sequence[PairView]) -> Section:
    """Languages of the chosen sides of a sample, and pairs whose sides differ in it."""
    from prefopt.signals.language import detect_language

    try:
        found = [
            (detect_language(p.chosen[:500]), detect_language(p.rejected[:500])) for p in sample
        ]
    except ConfigError:
        check = Check(
            "language", "none", "langdetect is not installed", advice='pip install "prefopt[data]"'
        )
        return Section("language", "Language", (check,))
    counts = Counter(language or "none" for language, _ in found)
    differ = sum(a != b and a is not None and b is not None for a, b in found) / max(1, len(found))
    main, count = counts.most_common(1)[0] if counts else ("none", 0)
    share = count / max(1, len(found))
    checks = (
        judged(
            "language", grade(1 - share, look=0.1), f"{share:.1%} of chosen sides are {main}", share,
            "look below 90 %", "a mixture: meant? Short texts and code are often taken for another language",
        ),
        judged(
            "sides in two languages", grade(differ, look=0.05), f"{differ:.1%} of pairs", differ, "look above 5 %",
            "the pair teaches a language, not an answer; short texts and code are often mistaken",
        ),
    )  # fmt: skip
    rows = tuple(
        (name, f"{n:,}", f"{n / max(1, len(found)):.1%}") for name, n in counts.most_common(10)
    )
    table = TableView("Languages of chosen sides", ("language", "pairs", "share"), rows)
    numbers = {
        "languages": dict(counts.most_common()),
        "sides_differ": differ,
        "num_sampled": len(found),
    }
    note = f"Asked of langdetect on {len(found):,} pairs drawn by hash; it is slow."
    return Section("language", "Language", checks, numbers, tables=(table,), note=note)
