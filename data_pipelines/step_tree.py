"""Solutions cut into steps, and the tree they make: what each partial solution is worth. Pure.

A step is a piece of text with its separator, so that steps put together are the solution to the letter. Two
solutions share a node as long as their steps are the same text. The value of a node is the mean outcome of the
solutions that pass through it: the Monte-Carlo estimate of what the policy makes of that prefix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

CORRECT, INCORRECT = 1.0, -1.0
_ROUNDING = 1e-9


def split_steps(text: str, separator: str) -> list[str]:
    """The steps of a solution, each with the separators that follow it; joined they are ``text``.

    Separators in a row end one step: an empty line is no step of its own.
    """
    end = re.escape(separator)
    pieces = re.findall(rf"(?:(?!{end}).)*(?:{end})*", text, re.DOTALL)
    return [piece for piece in pieces if piece]


@dataclass
class Node:
    """A partial solution: all steps from the root to here."""

    text: str = ""
    """The steps up to here, joined."""
    depth: int = 0
    """How many they are."""
    leaves: list[int] = field(default_factory=list)
    """Solutions that pass through here or end here, as indices; equal ones count as often as they were sampled."""
    children: dict[str, Node] = field(default_factory=dict)
    """By step, in the order in which the solutions came."""


@dataclass(frozen=True)
class Siblings:
    """Two steps after the same prefix, of which one is worth more."""

    prefix: Node
    chosen: Node
    rejected: Node


def grow(solutions: Sequence[Sequence[str]]) -> Node:
    """The prefix tree of solutions given as steps."""
    root = Node()
    for number, steps in enumerate(solutions):
        node = root
        node.leaves.append(number)
        for step in steps:
            node = node.children.setdefault(step, Node(node.text + step, node.depth + 1))
            node.leaves.append(number)
    return root


def value(node: Node, outcomes: Sequence[float]) -> float:
    """Mean outcome of the solutions through ``node``."""
    return sum(outcomes[number] for number in node.leaves) / len(node.leaves)


def sibling_pairs(
    root: Node, outcomes: Sequence[float], *, min_gap: float, min_leaves: int
) -> list[Siblings]:
    """Every two children of a node whose values differ by more than ``min_gap``, the better one chosen.

    Depth first, children in the order in which they came. A solution that ends at a node is no child of it: there
    is no step to prefer.

    Args:
        root: of `grow`.
        outcomes: of each solution.
        min_gap: V(chosen) - V(rejected) must be above it, in the units of the outcome.
        min_leaves: solutions below either child at least: the estimate of one is its own outcome.

    Source: methods E4 (b), AlphaLLM-CPL, arXiv:2410.06508.
    """
    found = []
    for node in _walk(root):
        children = [child for child in node.children.values() if len(child.leaves) >= min_leaves]
        for better in children:
            for worse in children:
                if value(better, outcomes) - value(worse, outcomes) > min_gap:
                    found.append(Siblings(node, better, worse))
    return found


@dataclass(frozen=True)
class State:
    """A partial solution and the different steps that were taken from it, in the order in which they came."""

    prefix: Node
    actions: tuple[Node, ...]
    values: tuple[float, ...]
    """V of the state after each action."""
    advantages: tuple[float, ...]


def step_advantages(
    root: Node, outcomes: Sequence[float], *, min_gap: float, min_leaves: int
) -> list[State]:
    """States with two different next steps or more, and A(s,a) = V(s·a) - the mean of V over the steps from s.

    V is the share of right answers (the mean outcome) below a state. Equal steps are one action: they share a
    node. Depth first. A solution that ends at a state takes no step from it.

    Args:
        root: of `grow`.
        outcomes: of each solution.
        min_gap: keep states whose largest and smallest advantage are at least so far apart.
        min_leaves: solutions below an action at least; others are no candidates.

    Source: methods C7 (b), (d), arXiv:2412.18279: there V is a critic trained on such estimates, gap 0.1.
    """
    found = []
    for node in _walk(root):
        actions = [each for each in node.children.values() if len(each.leaves) >= min_leaves]
        values = [value(each, outcomes) for each in actions]
        # an estimate is a fraction, and 0.6 - 0.5 is a hair below 0.1
        if len(actions) < 2 or max(values) - min(values) < min_gap - _ROUNDING:
            continue
        mean = math.fsum(values) / len(values)
        advantages = tuple(each - mean for each in values)
        found.append(State(node, tuple(actions), tuple(values), advantages))
    return found


def _walk(node: Node) -> Iterator[Node]:
    stack = [node]  # not recursive: a solution may have more steps than Python has frames
    while stack:
        found = stack.pop()
        yield found
        stack.extend(reversed(found.children.values()))


def step_scores(
    labels: Sequence[object], num_steps: int, *, right: bool
) -> tuple[float, ...] | None:
    """Scores of the steps of one solution, as SPARE takes them: 1 correct, -1 incorrect.

    Anything but the label CORRECT is incorrect, a label that is missing, too. The last step's is the outcome,
    whatever the annotator said.

    Args:
        labels: a label a step, or SPARE's ``{"student_step": 1, "label": "CORRECT"}`` in any order.
        num_steps: of the solution.
        right: whether its answer is.

    Returns: one score a step; None where a label is for a step that is not there.
    Source: methods F3 (b), SPARE, arXiv:2506.15498.
    """
    by_step: dict[int, object] = {}
    for place, label in enumerate(labels):
        if isinstance(label, Mapping):
            number = label.get("student_step")
            place, label = (number - 1 if isinstance(number, int) else -1), label.get("label")
        if not 0 <= place < num_steps:
            return None
        by_step[place] = label
    scores = [
        CORRECT if str(by_step.get(step)).strip().upper() == "CORRECT" else INCORRECT
        for step in range(num_steps)
    ]
    return (*scores[:-1], CORRECT if right else INCORRECT)


def pareto_pairs(points: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
    """Every (i, j) where i beats j in both numbers, strictly: in the order of i, then j.

    Source: the released configuration of SPARE-ORPO (``pareto_comparator`` with ``strict: true``).
    """
    return [
        (i, j)
        for i, one in enumerate(points)
        for j, other in enumerate(points)
        if one[0] > other[0] and one[1] > other[1]
    ]
