"""AutoIF's first half: instructions whose following Python can decide, with functions that agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import PositiveFloat, PositiveInt

from data_pipelines.base import Dropped, Place, Result, RowByRow, StageSettings
from data_pipelines.checker_votes import Case, Proposal, cross_check, read_proposal
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind, prompt_text, user_fields
from data_pipelines.templates import read_template, template_basis, with_prompt_text
from prefopt.errors import DataError
from prefopt.recipe.schema import Fraction, NoEffect, PathText
from prefopt.recipe.yaml_file import Document, KeyPath
from prefopt.signals.checkers import CheckerLimits, Vote, run_checker, run_checkers
from prefopt.signals.judge import fill
from prefopt.signals.sandbox import Promise

ASK_TEMPLATE = """\
Somebody gives an assistant this instruction:

<instruction>
{instruction}
</instruction>

Write a Python function `evaluate(response)` that takes the assistant's response, a string, and returns True if \
the response follows the instruction, else False. Use nothing but the standard library, read no file and no \
network. Then make up three responses, some that follow the instruction and some that do not.

Reply with one JSON object in a ```json fence and nothing else:
{"func": "the function's source, with \\n for line breaks", "cases": [{"input": "a response", "output": true}]}"""


@stage(
    "ask_checkers",
    works="map",
    reads={RowKind.PROMPTS},
    gives=RowKind.PROMPTS,
    source="AutoIF (arXiv:2406.13542), verification functions and cases",
)
class AskCheckers(StageSettings):
    """Turns each instruction into the request for a function that checks it, and test cases. `sample` comes next.

    The instruction goes to the column `instruction`. A prompt of messages becomes one user message.
    """

    template: PathText | None = None
    """A text file in place of our own; holds `{instruction}` and asks for JSON with `func` and `cases`."""

    def basis(self) -> Mapping[str, Any]:
        return template_basis(self._template())

    def gives_fields(self) -> tuple[str, ...]:
        return ("instruction",)

    def _template(self) -> str:
        where = "ask_checkers.template"
        return read_template(self.template, ASK_TEMPLATE, ("{instruction}",), where)

    def open(self, place: Place) -> RowByRow:
        template = self._template()

        def ask(row: Row) -> Result:
            _require_free(row, "instruction")
            instruction = prompt_text(row).strip()
            if not instruction:
                return Dropped("empty_instruction")
            asked = with_prompt_text(row, fill(template, {"instruction": instruction}))
            return {**asked, "instruction": instruction}

        return RowByRow(ask)


@stage(
    "checkers",
    works="map",
    reads={RowKind.GROUPS},
    gives=RowKind.PROMPTS,
    source="AutoIF (arXiv:2406.13542), cross-validation; methods F1 (d) 3",
)
class Checkers(StageSettings):
    """Keeps the checker functions and test cases that agree, of the answers to `ask_checkers`.

    Each response is one answer. A function loses its lines that download; one that does not run, or defines no
    `evaluate`, is out. Of what is left, distinct functions and cases: a case is kept if one function agrees with
    it, a function if it gets enough of the kept cases right. Everything runs in the sandbox. The row becomes the
    instruction, with `checkers` (sources), `checker_accuracies`, `checker_cases` ([response, expected]) and
    `checker_answers`: how many answers could be read, and what was wrong with the others.

    Dropped: `too_few_functions`, `too_few_cases`, `no_accurate_function`.
    """

    min_functions: PositiveInt = 3
    """Least distinct functions that run."""
    min_cases: PositiveInt = 10
    """Least distinct cases."""
    min_accuracy: Fraction = 0.8
    """Least share of the kept cases that a function gets right."""
    timeout_s: PositiveFloat = 5.0
    """Longest wall time of one call; then the function is wrong about that case."""
    memory_mib: PositiveInt = 1024
    """Address space of one function, MiB."""
    num_workers: Annotated[PositiveInt, NoEffect("rows")] = 2
    """Functions run at a time."""
    accept_risks: tuple[Promise, ...] = ()
    """What the sandbox promises and need not hold here; `prefopt doctor` shows what does."""
    readable: tuple[str, ...] = ()
    """Files and directories that a function may read beside Python's libraries."""

    def code(self) -> tuple[Any, ...]:
        return (read_proposal, run_checker)

    def problems(self, reads: RowKind | None, document: Document, path: KeyPath) -> list[str]:
        if self.min_accuracy > 0:
            return []
        return [
            f"{document.origin((*path, 'min_accuracy'))}checkers.min_accuracy = 0: would keep functions that are "
            "always wrong; 0.8 is the published one"
        ]

    def needs_fields(self) -> tuple[str, ...]:
        return ("instruction",)

    def gives_fields(self) -> tuple[str, ...]:
        return ("checkers", "checker_accuracies", "checker_cases", "checker_answers")

    def open(self, place: Place) -> RowByRow:
        for_call = CheckerLimits(
            self.timeout_s, self.memory_mib << 20, self.accept_risks, self.readable
        )
        run_checker("", (), for_call)  # where code cannot be isolated is known before the first row
        return RowByRow(lambda row: self._check(row, for_call))

    def _check(self, row: Row, limits: CheckerLimits) -> Result:
        instruction = row.get("instruction")
        if not isinstance(instruction, str):
            raise DataError(
                f"row {row['id']}: the stage `checkers` reads the column 'instruction' (text), which "
                "`ask_checkers` writes; put that stage before `sample`, or add the column"
            )
        answers = [read_proposal(response["text"]) for response in row["responses"]]
        proposals = [answer for answer in answers if isinstance(answer, Proposal)]
        sources = list(dict.fromkeys(proposal.source for proposal in proposals))
        cases = list(dict.fromkeys(case for proposal in proposals for case in proposal.cases))
        if len(cases) < self.min_cases:
            return Dropped("too_few_cases", f"{len(cases)} distinct, of {_counts(answers)}")
        votes = self._votes(sources, cases, limits)
        if len(votes) < self.min_functions:
            return Dropped("too_few_functions", f"{len(votes)} that run, of {_counts(answers)}")
        checked = cross_check(list(votes.values()), [expected for _, expected in cases])
        found = zip(votes, checked.accuracies, strict=True)
        kept = [(source, share) for source, share in found if share >= self.min_accuracy]
        if not kept:
            return Dropped("no_accurate_function", f"best {max(checked.accuracies):.2f}")
        columns = {
            "checkers": [source for source, _ in kept],
            "checker_accuracies": [share for _, share in kept],
            "checker_cases": [list(cases[number]) for number in checked.cases],
            "checker_answers": _counts(answers),
        }
        return {**with_prompt_text(row, instruction), **user_fields(row), **columns}

    def _votes(
        self, sources: Sequence[str], cases: Sequence[Case], limits: CheckerLimits
    ) -> dict[str, list[Vote]]:
        """What each function that runs says of each case."""
        texts = [text for text, _ in cases]
        results = run_checkers([(source, texts) for source in sources], limits, self.num_workers)
        found = zip(sources, results, strict=True)
        return {source: votes for source, votes in found if votes is not None}


def _counts(answers: Sequence[Proposal | str]) -> dict[str, int]:
    """Answers by what became of them."""
    counts = Counter("read" if isinstance(each, Proposal) else each for each in answers)
    return dict(sorted(counts.items()))


def _require_free(row: Row, name: str) -> None:
    if name in row:
        raise DataError(
            f"row {row['id']}: has a column {name!r} already, which this stage writes; rename it, or leave it out "
            "of stages.0.keep"
        )
