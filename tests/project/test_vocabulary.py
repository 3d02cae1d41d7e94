"""Code, docs and tests use the words of the field: what each other word is called here."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("fastdeq", "conf", "tests", "docs", "benchmarks", "tools", "slurm", "train.py", "*.md")
SUFFIXES = {".py", ".yaml", ".md", ".sbatch"}

_COUNT = "(?:ms|milliseconds|seconds|evaluations|one evaluation|products|kernels)"
_PER = (
    "scale|sample|step|epoch|solve|call|cycle|cell|batch|rank|run|row|setting|device|session"
    "|process|GPU"
)

WORDS: tuple[tuple[str, str, str], ...] = (
    # pattern, what to write, an example
    (r"(?<![\"'`.])figures?\b(?![\"'`]| \d)", "metric, statistic, plot", "the figures of a run"),
    (r"FigureMeans", "MeanMetrics", "FigureMeans()"),
    (
        r"(?<!\")(?:tells?|told)\b(?!(?: \w+){0,2} apart)",
        "report, warn, name",
        "the user is told",
    ),
    (r"(?:go|goes|going|gone|went) on\b", "continue, resume", "the run goes on"),
    (r"wish(?:es|ed)?\b", "stop request", "a wish to stop"),
    (r"(?-i:Passes\(|MadeStep)", "epoch loader, completed step", "MadeStep"),
    (r"(?-i:CarryingDDP|Meeting)", "a name that says what it does, rendezvous", "a Meeting"),
    (r"(?-i:(?:class|raise|except|import) Refused)", "ConfigError", "raise Refused"),
    (r"(?:check together|evolves?|blamed on)\b", "validate, solve, error context", "def evolve"),
    (r"(?-i:ASKED)\b", "STOP_SIGNALS", "ASKED"),
    (r"dismiss(?:es|ed)?\b", "release", "the leader dismisses them"),
    (r"calm\b", "cooldown", "a calm period"),
    (r"facts?\b", "metadata", "its facts"),
    (r"(?:transposed|forward) products?\b", "vjp, jvp", "a transposed product"),
    (r"product with (?:its|the) transposed", "vjp", "a product with its transposed Jacobian"),
    (r"(?<!`)packing\b", "flatten", "packing the state"),
    (r"fastdeq[./](?:packing|products|precision|clock)\b", "its new name", "fastdeq/clock.py"),
    (r"rooms\b|doors?\b|the (?:room|house)\b(?! number)", "package, entry point", "at the door"),
    (r"(?:import|the) floors?\b", "layer of the architecture", "import floors"),
    (r"level \d\b", "the name of the package", "of level 6"),
    (rf"(?:one|once) an? (?:{_PER})\b", "one per, once per", "a tensor, one a scale"),
    (rf"{_COUNT} an? (?:{_PER})\b", "per", "ms a step"),
    (
        rf"(?:an?|one) (?:row|line|block|file|mask|tensor|thread|job) an? (?:{_PER})\b",
        "one per",
        "a row a setting",
    ),
    (r"(?:is|are|was|were|be) no (?!longer\b|more\b|less\b)[a-z]", "is not a", "x is no tensor"),
    (r"(?:that|which|what) (?:is|are) none\b", "is not a", "a solver that is none"),
    (r"goes? with\b", "match", "of the size that goes with it"),
    (r"how-?manieth", "n-th, index of", "the how-manieth use"),
    (r"rubbish|riddles?\b", "undefined, obscure error", "below it is rubbish"),
    (r"idle (?:parameter|product|step|overrun)s?\b", "unused", "an idle parameter"),
    (r"for want of\b", "without, since there is no", "for want of a device"),
    (r"taught nothing", "had no effect", "it taught nothing"),
    (r"what made (?:them|it)\b", "provenance", "what made them"),
    (r"passed over\b", "skip, ignore", "a row is passed over"),
)

FINE = (
    "there is no key 'x'",
    "it is no longer needed",
    "Figure 3 of the paper",
    "a value of 5 per sample",
    "it is not a tensor",
    "the step limit of the solve",
    "in evaluation a sample does not depend on others",
    "the street view of house numbers",
    "a pass over the set",
    'summary["figures"] of an older version',
    'if "told" in saved',
    "formerly `packing`",
    "metric (not figure)",
)
"""Good sentences near the patterns."""

_COMPILED = [
    # Words of a phrase may be on two lines of a comment, and joined by _ in names.
    # "There is no X" is English, and matches without a group.
    (
        re.compile(rf"\bthere (?:is|are|was|were) no\b|\b({bad})".replace(" ", r"[\s_#]+"), re.I),
        good,
    )
    for bad, good, _ in WORDS
]


def uses(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, what is written, what to write) of every use of a word."""
    # A list of words names them as "(not X)".
    names = re.sub(r"\(not [^)]*\)", lambda match: re.sub(r"\S", " ", match[0]), text)
    names = names.replace("_", " ")
    for pattern, instead in _COMPILED:
        for match in pattern.finditer(names):
            if match[1]:
                yield names.count("\n", 0, match.start()) + 1, match[1], instead


def checked_files() -> list[Path]:
    return [
        path
        for place in PLACES
        for start in ROOT.glob(place)
        for path in (sorted(start.rglob("*")) if start.is_dir() else [start])
        if path.suffix in SUFFIXES and path != Path(__file__)
    ]


def test_every_checked_place_exists():
    assert [place for place in PLACES if not any(ROOT.glob(place))] == []


def test_the_words_are_those_of_the_field():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: '{' '.join(word.split())}': write {instead}"
        for path in checked_files()
        for line, word, instead in uses(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(["", *wrong])


def test_every_pattern_finds_its_example_and_leaves_good_sentences_alone():
    for bad, _, example in WORDS:
        assert list(uses(example)), (bad, example)
    assert [sentence for sentence in FINE if list(uses(sentence))] == []


def test_a_phrase_is_found_over_two_lines_and_in_names():
    assert [line for line, *_ in uses("# a row\n    # a setting\ndef is_no_solver(): pass")] == [
        1,
        3,
    ]
