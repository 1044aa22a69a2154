"""Where the graphs of several losses meet: private parts, one per task, above a common part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

_COMMON = -1


@dataclass(frozen=True)
class Cut:
    """A backward graph in two: what one loss alone reaches, and what several reach.

    Backward through a private part ends at that task's edges; from there on the tasks differ only in the gradients that
    they bring to the edges, so that the common part can be passed for several tasks at once, and a private part can be
    freed as soon as it was passed.

    Attributes:
        edges: Where private parts end and the common part begins.
        of_task: Per loss the indices of its edges.
        private: Per loss the leaves that it alone reaches, by id.
        reach: Per leaf of the common part, by id, the edges that lead to it, as a number with their bits set.
    """

    edges: list[GradientEdge]
    of_task: list[list[int]]
    private: list[set[int]]
    reach: dict[int, int]

    def reached(self, edges: Iterable[int], leaf: Tensor) -> bool:
        """Whether the common part leads from one of the edges to the leaf."""
        return bool(self.reach.get(id(leaf), 0) & _bits(edges))


def cut(losses: Sequence[Tensor]) -> Cut:
    """Cut the graph of several losses where they meet.

    It is cut at the losses themselves, without private parts, if an edge of a task leads to another edge of the same
    task (heads that read a feature and something computed from it; a weight tied between trunk and head; a penalty on
    the trunk in each loss), or if a hook of a tensor would change a gradient there, which it would do twice. The latter
    is tried with a gradient of zeros.

    Args:
        losses: Scalars with a graph.

    Note:
        Cost: two walks over the graph, a few us a node, and 10 us an edge.
    """
    roots = [(edge.node, edge.output_nr) for edge in map(get_gradient_edge, losses)]
    owner, private = _owners([node for node, _ in roots])
    edges: dict[tuple[Node, int], int] = {}
    of_task = []
    for root, nodes in zip(roots, private, strict=True):
        found = [(n, i) for node in nodes for n, i in node.next_functions if n is not None and owner[n] == _COMMON]
        if owner[root[0]] == _COMMON:
            found = [root]
        of_task.append([edges.setdefault(edge, len(edges)) for edge in dict.fromkeys(found)])
    targets = [GradientEdge(*edge) for edge in edges]
    leads = _leads_from(targets)
    if not (_unordered(of_task, targets, leads) and all(map(_unhooked, targets))):
        edges = {root: i for i, root in enumerate(dict.fromkeys(roots))}
        targets = [GradientEdge(*edge) for edge in edges]
        leads, private = _leads_from(targets), [[] for _ in losses]
        of_task = [[edges[root]] for root in roots]
    leaves = [{id(n.variable) for n in nodes if _is_leaf(n)} for nodes in private]  # type: ignore[attr-defined]
    reach = {id(n.variable): found for n, found in leads.items() if _is_leaf(n)}  # type: ignore[attr-defined]
    return Cut(targets, of_task, leaves, reach)


def _is_leaf(node: Node) -> bool:
    return type(node).__name__ == "AccumulateGrad"


def _after(node: Node) -> Iterable[Node]:
    return (n for n, _ in node.next_functions if n is not None)


def _bits(indices: Iterable[int]) -> int:
    bits = 0
    for i in indices:
        bits |= 1 << i
    return bits


def _owners(roots: Sequence[Node]) -> tuple[dict[Node, int], list[list[Node]]]:
    """For each node the task that alone reaches it, or `_COMMON`; and the nodes of each task."""
    owner: dict[Node, int] = {}
    found: list[list[Node]] = []
    for task, root in enumerate(roots):
        found.append([])
        stack = [root]
        while stack:
            node = stack.pop()
            before = owner.get(node)
            if before is None:
                owner[node] = task
                found[-1].append(node)
                stack.extend(_after(node))
            elif before not in (task, _COMMON):
                below = [node]
                while below:
                    node = below.pop()
                    if owner.get(node) != _COMMON:
                        owner[node] = _COMMON
                        below.extend(_after(node))
    return owner, [[n for n in nodes if owner[n] == task] for task, nodes in enumerate(found)]


def _leads_from(edges: Sequence[GradientEdge]) -> dict[Node, int]:
    """For each node below the edges, the edges that lead to it, as a number with their bits set."""
    order: list[Node] = []  # each node before those that it leads to, once reversed
    seen: set[Node] = set()
    for edge in edges:
        stack: list[tuple[Node, bool]] = [(edge.node, False)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack.extend((n, False) for n in _after(node) if n not in seen)
    leads = dict.fromkeys(order, 0)
    for i, edge in enumerate(edges):
        leads[edge.node] |= 1 << i
    for node in reversed(order):
        for n in _after(node):
            leads[n] |= leads[node]
    return leads


def _unordered(of_task: Sequence[list[int]], edges: Sequence[GradientEdge], leads: dict[Node, int]) -> bool:
    """Whether no edge of a task leads to another node at which an edge of the same task ends."""
    for mine in of_task:
        here: dict[Node, int] = {}
        for i in mine:
            here[edges[i].node] = here.get(edges[i].node, 0) | 1 << i
        if len(here) > 1 and any(leads[node] & _bits(mine) != bits for node, bits in here.items()):
            return False
    return True


def _unhooked(edge: GradientEdge) -> bool:
    """Whether no hook of the tensor at this edge changes its gradient."""
    about = edge.node._input_metadata[edge.output_nr]
    zero = torch.zeros(tuple(about.shape), dtype=about.dtype, device=about.device)
    after = torch.autograd.grad([edge], [edge], [zero], retain_graph=True, allow_unused=True)[0]
    return after is zero and zero._version == 0
