"""Feature level: the layer against the combination computed by hand."""

from __future__ import annotations

import copy
import io
import math
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import fastmtl
from fastmtl import MGDA, FeatureSurgery, GradNorm, GradVac, PCGrad, UncertaintyWeighting
from fastmtl.layer import IDLE_CALLS
from tests import nets
from tests.asserts import assert_on_simplex, assert_same_state, assert_untouched
from tests.nets import assert_grads, weighted_sum

METHODS: dict[str, Callable[[], fastmtl.GradientMethod]] = {
    "PCGrad": PCGrad,
    "GradVac": GradVac,
    "MGDA": MGDA,
    "GradNorm": lambda: GradNorm(scale_heads=False),
}


class LayerNet(nets.Net):
    """Trunk, surgery, heads."""

    def __init__(self, method: fastmtl.GradientMethod | fastmtl.LossWeighting, **options: Any) -> None:
        super().__init__(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6)), 6, 3)
        self.surgery = FeatureSurgery(method, num_tasks=3, **options)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.surgery.total(self.losses(x))

    def losses(self, x: Tensor) -> list[Tensor]:
        zs = self.surgery(self.trunk(x))
        return self.head_losses(zs)

    def head_losses(self, zs: tuple[Tensor, ...]) -> list[Tensor]:
        return [
            ((head(z) - (-1) ** t * (t + 1)) ** 2).mean()
            for t, (head, z) in enumerate(zip(self.heads, zs, strict=True))
        ]


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 5, dtype=dtype)


def by_hand(net: LayerNet, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Per task the gradient of its loss at the features, and the features with their graph."""
    features = net.trunk(x)
    leaf = features.detach().requires_grad_()
    losses = net.head_losses((leaf,) * 3)
    return [torch.autograd.grad(loss, leaf)[0] for loss in losses], features


@pytest.mark.parametrize("method", METHODS)
def test_equals_the_combination_by_hand(method: str) -> None:
    net, x = LayerNet(METHODS[method]()), inputs()
    rows, features = by_hand(net, x)
    jacobian = torch.stack([r.flatten() for r in rows])
    net(x).backward()
    result = net.surgery.result
    torch.testing.assert_close(result.gramian, jacobian @ jacobian.T, rtol=1e-12, atol=0)
    assert result.weights.shape == (3,)
    (direction,) = weighted_sum([[r] for r in rows], result.weights)
    assert_grads(net.trunk.parameters(), torch.autograd.grad(features, [*net.trunk.parameters()], direction))
    plain = torch.autograd.grad(sum(net.head_losses((features.detach(),) * 3)), [*net.heads.parameters()])
    assert_grads(net.heads.parameters(), plain)


def test_with_mgda_it_is_mgda_ub() -> None:
    """The min-norm point over the whole batch's feature gradients: all products equal on the support, none smaller."""
    net, x = LayerNet(MGDA()), inputs()
    rows, _ = by_hand(net, x)
    jacobian = torch.stack([r.flatten() for r in rows])
    net(x).backward()
    weights = net.surgery.result.weights
    assert_on_simplex(weights)
    direction = weights @ jacobian
    products = jacobian @ direction
    square = direction @ direction
    assert (products >= square - 1e-12).all()
    torch.testing.assert_close(products[weights > 0], square.expand(int((weights > 0).sum())), rtol=1e-9, atol=1e-12)


def test_total_of_losses_that_skip_it() -> None:
    """`total` is a convenience: for methods that need no loss values the plain sum does as well."""
    net, x = LayerNet(MGDA()), inputs()
    net(x).backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    sum(net.losses(x)).backward()
    assert_grads(net.parameters(), expected)


def test_absent_tasks() -> None:
    for name, make in METHODS.items():
        net = LayerNet(make())
        a, _, c = net.losses(inputs())
        net.surgery.total([a, None, c]).backward()
        weights = net.surgery.result.weights
        assert weights[1] == 0
        assert (weights[[0, 2]] != 0).all()  # MGDA would give all weight to a task with a zero gradient
        assert net.heads[1].weight.grad is None
        net(inputs()).backward()
        assert name == "MGDA" or net.surgery.result.weights[1] != 0
        a, b, _ = net.losses(inputs())  # another one than before
        net.surgery.total([a, b, None]).backward()
        weights = net.surgery.result.weights
        assert weights[2] == 0
        assert name == "MGDA" or (weights[:2] != 0).all()


@pytest.mark.parametrize("declared", [True, False])
def test_a_task_whose_loss_misses_the_features_is_absent(declared: bool) -> None:
    """Not a zero gradient, which would take all of MGDA's weight and stop the trunk."""
    torch.manual_seed(0)
    features = torch.randn(4, 3, requires_grad=True)
    elsewhere = torch.ones((), requires_grad=True)
    surgery = fastmtl.FeatureSurgery(fastmtl.MGDA(), num_tasks=3)
    z = surgery(features)
    losses = [(z[0] ** 2).sum(), z[1].sum(), elsewhere * 1]
    (surgery.total(losses) if declared else sum(losses)).backward()
    rows = torch.stack([2 * features.detach(), torch.ones(4, 3)]).flatten(1)
    alone = fastmtl.aggregate(rows, fastmtl.MGDA())
    torch.testing.assert_close(surgery.result.weights, torch.cat([alone.weights, torch.zeros(1)]))
    torch.testing.assert_close(features.grad.flatten(), alone.grads)
    assert features.grad.norm() > 0.1


def test_a_forward_pass_in_between_does_not_bring_an_absent_task_back() -> None:
    net = LayerNet(fastmtl.MGDA())
    a, _, c = net.losses(inputs())
    total = net.surgery.total([a, None, c])
    net.losses(inputs())
    total.backward()
    assert net.surgery.result.weights[1] == 0


def test_an_error_in_backward_leaves_the_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise MemoryError

    net = LayerNet(GradNorm(scale_heads=False))
    net(inputs()).backward()
    total = net(inputs())
    monkeypatch.setattr("fastmtl.ops.combine", fail)
    with assert_untouched(net.surgery), pytest.raises(MemoryError):
        total.backward()


def test_a_single_task() -> None:
    surgery = FeatureSurgery(PCGrad(), num_tasks=1)
    z = torch.randn(3, requires_grad=True)
    (out,) = surgery(z)
    surgery.total([out.pow(2).sum()]).backward()
    torch.testing.assert_close(z.grad, 2 * z.detach())


def test_features_of_any_strides_and_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        z = torch.randn(2, 3, 4, 5).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        surgery = FeatureSurgery(MGDA(), num_tasks=2)
        a, b = surgery(z)
        surgery.total([(a.float() * 2).sum(), (b.float() * 4).sum()]).backward()
        assert z.grad.dtype == dtype
        torch.testing.assert_close(z.grad, torch.full_like(z, 2.0))


# ---- several features ------------------------------------------------------------------------------------------------


Pair = namedtuple("Pair", "left right")

STRUCTURES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tuple": (lambda a, b: (a, b), lambda z: z),
    "list": (lambda a, b: [a, b], tuple),
    "dict": (lambda a, b: {"b": b, "a": a}, lambda z: (z["a"], z["b"])),
    "ordered": (lambda a, b: OrderedDict(b=b, a=a), lambda z: (z["a"], z["b"])),
    "named": (Pair, lambda z: (z.left, z.right)),
    "nested": (lambda a, b: {"x": [a, (None, b)], "size": 3}, lambda z: (z["x"][0], z["x"][1][1])),
}


def two_features(dtypes: Sequence[torch.dtype] = (torch.float64, torch.float64)) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    return a.to(dtypes[0]).requires_grad_(), b.to(dtypes[1]).requires_grad_()


def three_losses(copies: Sequence[tuple[Tensor, Tensor]], wide: bool = True) -> list[Tensor]:
    """The first task reads both features, the others one each."""
    (a0, b0), (a1, _), (_, b2) = copies
    return [
        a0.double().sin().sum() + b0.double().exp().sum(),
        (2 * a1.double() - 1).square().sum(),
        -b2.double().square().sum(),
    ]


def combined_by_hand(a: Tensor, b: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Gramian over both features in float64, and the weighted sums of the losses' gradients."""
    losses = three_losses([(a, b)] * 3)
    grads = [torch.autograd.grad(x, (a, b), allow_unused=True, materialize_grads=True) for x in losses]
    jacobian = torch.stack([torch.cat([g.double().flatten() for g in row]) for row in grads])
    sums = [sum(w * row[i].double() for w, row in zip(weights, grads, strict=True)) for i in range(2)]
    return jacobian @ jacobian.T, sums[0], sums[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_several_features(structure: str, method: str) -> None:
    """One surgery over all of them."""
    pack, unpack = STRUCTURES[structure]
    a, b = two_features()
    surgery = FeatureSurgery(METHODS[method](), num_tasks=3)
    packed = pack(a, b)
    zs = surgery(packed)
    assert [type(z) for z in zs] == [type(packed)] * 3
    assert not isinstance(packed, dict) or all([*z] == [*packed] for z in zs)
    surgery.total(three_losses([unpack(z) for z in zs])).backward()
    assert (surgery.result.weights != 0).sum() >= 2  # a task that reads one feature is there
    gramian, left, right = combined_by_hand(a, b, surgery.result.weights)
    torch.testing.assert_close(surgery.result.gramian, gramian, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.grad, left, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b.grad, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_of_several_dtypes(dtype: torch.dtype) -> None:
    a, b = two_features((torch.float64, dtype))
    surgery = FeatureSurgery(MGDA(), num_tasks=3)
    surgery.total(three_losses(surgery((a, b)))).backward()
    gramian, left, right = combined_by_hand(a, b, surgery.result.weights)
    assert (a.grad.dtype, b.grad.dtype) == (torch.float64, dtype)
    torch.testing.assert_close(surgery.result.gramian, gramian, rtol=1e-6, atol=0)
    torch.testing.assert_close(a.grad, left)
    torch.testing.assert_close(b.grad, right.to(dtype))


def test_a_feature_that_nobody_reads_gets_no_gradient() -> None:
    a, b = two_features()
    surgery = FeatureSurgery(MGDA(), num_tasks=2)
    (left, _), (right, _) = surgery((a, b))
    surgery.total([left.sum(), right.square().sum()]).backward()
    assert a.grad is not None
    assert b.grad is None


def test_a_task_that_reads_no_feature_is_absent() -> None:
    a, b = two_features()
    elsewhere = torch.ones((), dtype=torch.float64, requires_grad=True)
    surgery = FeatureSurgery(MGDA(), num_tasks=3)
    zs = surgery({"a": a, "b": b})
    surgery.total([zs[0]["a"].sum(), zs[1]["b"].sum(), elsewhere * 1]).backward()
    torch.testing.assert_close(surgery.result.weights, torch.tensor([10, 12, 0]).double() / 22)  # 1 / squared norms


def test_a_feature_that_is_there_twice_is_one() -> None:
    """As the last hidden state of many transformers, which is also the last of all hidden states."""
    a, b = two_features()
    surgery = FeatureSurgery(MGDA(), num_tasks=2)
    zs = surgery({"last": b, "all": (a, b)})
    surgery.total([zs[0]["last"].sum() + zs[0]["all"][1].sum(), zs[1]["last"].square().sum()]).backward()
    rows = torch.stack([torch.full_like(b, 2.0), 2 * b.detach()]).detach().flatten(1)
    torch.testing.assert_close(surgery.result.gramian, rows @ rows.T)
    torch.testing.assert_close(b.grad.flatten(), surgery.result.weights @ rows)


def test_what_needs_no_gradient_passes_through() -> None:
    a, b = two_features()
    mask, frozen = torch.ones(4, dtype=torch.bool), b.detach()
    surgery = FeatureSurgery(MGDA(), num_tasks=2)
    for z in surgery((a, mask, frozen, None, 7, "x", torch.Size([1, 2]))):
        assert z[0] is not a
        assert z[1] is mask
        assert z[2] is frozen
        assert z[3:] == (None, 7, "x", torch.Size([1, 2]))


def test_packed_sequences() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(2, 2)])
    lstm = nn.LSTM(2, 3)
    surgery = FeatureSurgery(MGDA(), num_tasks=2)
    zs = surgery(lstm(packed)[0])
    assert all(isinstance(z, nn.utils.rnn.PackedSequence) for z in zs)
    surgery.total([zs[0].data.sum(), zs[1].data.square().sum()]).backward()
    assert_on_simplex(surgery.result.weights)
    assert all(p.grad is not None for p in lstm.parameters())


def test_structures_in_evaluation() -> None:
    """The same tensors, in containers of each head's own."""
    surgery = FeatureSurgery(MGDA(), num_tasks=2).eval()
    a, b = two_features()
    features = {"a": a, "b": b}
    zs = surgery(features)
    assert all(z == features and z is not features for z in zs)
    zs[0].pop("a")
    assert [*zs[1]] == [*features] == ["a", "b"]


def test_features_that_do_not_fit_raise() -> None:
    @dataclass
    class Output:
        features: Tensor

    surgery = FeatureSurgery(MGDA(), num_tasks=2)
    a, b = two_features()
    with pytest.raises(TypeError, match=r"features\['z'\]\[1\]: expected a tensor, found Output.*register_pytree_node"):
        surgery({"z": (a, Output(b))})
    with pytest.raises(TypeError, match=r"features\['p4'\]: complex"):
        surgery({"p3": a, "p4": torch.ones(2, dtype=torch.complex64, requires_grad=True)})
    with pytest.raises(TypeError, match="features: complex"):
        surgery(torch.ones(2, dtype=torch.complex64, requires_grad=True))
    with pytest.raises(ValueError, match=r"features\[1\]: on meta, the others on cpu"):
        surgery((a, torch.ones(2, device="meta", requires_grad=True)))


# ---- identity --------------------------------------------------------------------------------------------------------


def test_identity_where_nothing_is_learned() -> None:
    net = LayerNet(PCGrad())
    features = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    with assert_untouched(net):
        net.eval()
        assert all(z is features for z in net.surgery(features))
        net.surgery.total(net.losses(inputs())).backward()
        net.zero_grad()
        net.train()
        with torch.no_grad():
            assert all(z is features for z in net.surgery(features))
            net(inputs())
        assert all(z is not features for z in net.surgery(features))
        frozen = features.detach()
        assert all(z is frozen for z in net.surgery(frozen))


def test_eval_gives_plain_gradients() -> None:
    net, x = LayerNet(PCGrad()).eval(), inputs()
    net(x).backward()
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    sum(net.head_losses((net.trunk(x),) * 3)).backward()
    assert_grads(net.parameters(), found)


def test_a_head_that_writes_in_place_raises_in_training() -> None:
    """It would corrupt its siblings' features."""
    net = LayerNet(PCGrad())
    z, *_ = net.surgery(net.trunk(inputs()))
    with pytest.raises(RuntimeError, match=r"inplace|in-place"):
        z.relu_()


# ---- losses, scaler, precision ---------------------------------------------------------------------------------------


def test_methods_that_need_losses_get_them_from_total() -> None:
    method = GradNorm(scale_heads=False)
    net, x = LayerNet(method), inputs()
    values = [float(v.detach()) for v in net.losses(x)]
    with (
        assert_untouched(net.trunk, method),
        pytest.raises(ValueError, match=r"GradNorm needs the losses: call surgery.total"),
    ):
        sum(net.losses(x)).backward()
    net(x).backward()
    assert method.initial_losses.tolist() == values
    with pytest.raises(ValueError, match=r"GradNorm needs the losses"):  # those of the last step are not this step's
        sum(net.losses(x)).backward()


def test_equals_parameter_level_with_the_gramian_on_the_features() -> None:
    """GradNorm's state after some steps is that of an independent run on feature gradients."""
    net, reference = LayerNet(GradNorm(scale_heads=False)), GradNorm(scale_heads=False)
    for _ in range(3):
        x = inputs()
        rows, _ = by_hand(net, x)
        jacobian = torch.stack([r.flatten() for r in rows])
        losses = torch.stack([v.detach() for v in net.losses(x)])
        expected = reference(jacobian @ jacobian.T, losses=losses)
        net(x).backward()
        torch.testing.assert_close(net.surgery.result.weights, expected)
        torch.testing.assert_close(net.surgery.method.weights, reference.weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_the_model_does_not_round_loss_values(dtype: torch.dtype) -> None:
    surgery = FeatureSurgery(GradNorm(scale_heads=False), num_tasks=2).to(dtype)
    z = torch.ones(2, requires_grad=True)
    a, b = surgery(z)
    losses = [a.sum() * 100_000.0, b.sum() * 1.2345678]
    surgery.total(losses).backward()
    assert surgery.method.initial_losses.tolist() == [float(x.detach()) for x in losses]


def test_a_loss_weighting_weighs_the_losses() -> None:
    weighting = UncertaintyWeighting(3, init=0.5)
    net, x = LayerNet(weighting), inputs()
    total = net(x)
    total.backward()
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    expected = weighting(net.head_losses((net.trunk(x),) * 3))
    torch.testing.assert_close(total.detach(), expected.detach())
    expected.backward()
    assert_grads(net.parameters(), found)
    assert any(p is weighting.s for p in net.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_scaler(method: str) -> None:
    """Neither the method nor its state sees the loss scale."""
    found = []
    for scale in (1.0, 2.0**14):
        torch.manual_seed(3)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        net = LayerNet(METHODS[method](), scaler=scaler)
        for _ in range(2):
            net.zero_grad()
            scaler.scale(net(inputs())).backward()
        result = net.surgery.result
        grads = [p.grad / scale for p in net.parameters()]
        found.append([result.weights, result.gramian, *net.surgery.method.state_dict().values(), *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["PCGrad", "GradVac", "GradNorm"])
def test_an_overflow_leaves_the_state_alone(method: str) -> None:
    net = LayerNet(METHODS[method]())
    net(inputs()).backward()
    net.zero_grad()
    with assert_untouched(net.surgery.method):
        losses = net.losses(inputs())
        net.surgery.total([losses[0], losses[1] * math.inf, losses[2]]).backward()
    assert all(p.grad.isnan().all() for p in net.trunk.parameters())
    net.zero_grad()
    net(inputs()).backward()
    assert net.surgery.result.weights.isfinite().all()


def test_drop_task() -> None:
    net = LayerNet(PCGrad(), nonfinite="drop_task")
    a, b, c = net.losses(inputs())
    net.surgery.total([a, b * math.nan, c]).backward()
    assert net.surgery.result.weights[1] == 0
    assert all(p.grad.isfinite().all() for p in net.trunk.parameters())


def test_autocast() -> None:
    net, x = LayerNet(MGDA()).float(), inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        zs = net.surgery(net.trunk(x))
        assert zs[0].dtype == torch.bfloat16
        total = net.surgery.total(net.head_losses(zs))
    total.backward()
    assert_on_simplex(net.surgery.result.weights)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


# ---- copies, derivatives ---------------------------------------------------------------------------------------------


def pickled(net: LayerNet) -> LayerNet:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_has_its_own_method(copied: Callable[[LayerNet], LayerNet]) -> None:
    net = LayerNet(GradVac())
    net(inputs()).backward()
    twin = copied(net)
    assert_same_state(net, twin)
    assert twin.surgery.result is None
    with assert_untouched(net.surgery):
        twin(inputs()).backward()
    assert twin.surgery.method.rng[1] == 2
    assert twin.surgery.result is not None


def test_state_dict_round_trip() -> None:
    """A fresh model goes on exactly as the first."""
    net = LayerNet(GradVac())
    for _ in range(2):
        net(inputs()).backward()
    fresh = LayerNet(GradVac())
    fresh.load_state_dict(net.state_dict(), strict=True)
    x = inputs()
    for model in (net, fresh):
        model.zero_grad()
        model(x).backward()
    assert_same_state(net, fresh)
    assert_grads(fresh.parameters(), [p.grad for p in net.parameters()], rtol=0)


def test_the_layer_adds_nothing_to_the_state_but_the_methods() -> None:
    assert [*FeatureSurgery(MGDA(), 2).state_dict()] == []
    assert all(name.startswith("method.") for name in FeatureSurgery(GradVac(), 2).state_dict())


@pytest.mark.parametrize("method", [MGDA(), UncertaintyWeighting(3)], ids=["MGDA", "UncertaintyWeighting"])
def test_a_layer_that_is_never_used_warns(method: fastmtl.GradientMethod | fastmtl.LossWeighting) -> None:
    net, x = LayerNet(method), inputs()
    for _ in range(3 * IDLE_CALLS):
        net(x).backward()
    for _ in range(IDLE_CALLS - 1):
        net.surgery(net.trunk(x))
    with pytest.warns(UserWarning, match="zs\\[t\\]" if isinstance(method, MGDA) else "total") as told:
        net.surgery(net.trunk(x))
    assert told[0].filename == __file__
    net.surgery(net.trunk(x))


def test_no_double_backward() -> None:
    net = LayerNet(PCGrad())
    total = net(inputs())
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(total, [*net.trunk.parameters()], create_graph=True)


def test_errors() -> None:
    with pytest.raises(TypeError, match="construct it"):
        FeatureSurgery(MGDA, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"num_tasks.*0"):
        FeatureSurgery(MGDA(), 0)
    with pytest.raises(ValueError, match=r"GradNorm: a layer cannot scale the heads.*scale_heads=False"):
        FeatureSurgery(GradNorm(), 2)
    for policy in ("skip", "raise", "ignore"):
        with pytest.raises(ValueError, match=f"nonfinite.*'{policy}'"):
            FeatureSurgery(MGDA(), 2, nonfinite=policy)
    with pytest.raises(ValueError, match="would hide overflows"):
        FeatureSurgery(MGDA(), 2, nonfinite="drop_task", scaler=torch.amp.GradScaler("cpu"))
    surgery = FeatureSurgery(MGDA(), 2)
    for nothing in (None, 3, (), {"mask": None}):
        with pytest.raises(TypeError, match=f"features: expected a tensor.*found {type(nothing).__name__}"):
            surgery(nothing)
    with pytest.raises(ValueError, match="losses: expected 2 tasks, found 1"):
        surgery.total([torch.tensor(1.0)])


# ---- checkpointing, wrong uses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_around_layer_and_heads(use_reentrant: bool) -> None:
    """The forward pass is repeated within backward, when the losses and absent tasks are known already."""
    expected, found = LayerNet(MGDA()), LayerNet(MGDA())
    found.load_state_dict(expected.state_dict())
    x = inputs().requires_grad_()
    for net, wrapped in ((expected, False), (found, True)):

        def outputs(x: Tensor, net: LayerNet = net) -> tuple[Tensor, ...]:
            return tuple(head(z) for head, z in zip(net.heads, net.surgery(net.trunk(x)), strict=True))

        outs = checkpoint(outputs, x, use_reentrant=use_reentrant) if wrapped else outputs(x)
        losses: list[Tensor | None] = [(out - t).square().mean() for t, out in enumerate(outs)]
        losses[1] = None
        net.surgery.total(losses).backward()
        assert net.surgery.result is not None
        assert net.surgery.result.weights[1] == 0
    for p, q in zip(expected.trunk.parameters(), found.trunk.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_validation_between_total_and_backward_changes_nothing() -> None:
    net, x = LayerNet(MGDA()), inputs()
    losses: list[Tensor | None] = [*net.losses(x)]
    losses[0] = None
    total = net.surgery.total(losses)
    with torch.no_grad():
        net.losses(x)
    total.backward()
    assert net.surgery.result is not None
    assert net.surgery.result.weights[0] == 0


def test_a_second_pass_raises() -> None:
    net = LayerNet(GradVac())
    total = net(inputs())
    total.backward(retain_graph=True)
    with assert_untouched(net.surgery, net.trunk), pytest.raises(RuntimeError, match="a second backward pass"):
        total.backward()


@pytest.mark.parametrize("total_too", [False, True])
@pytest.mark.parametrize("earlier_step", [False, True])
def test_one_backward_per_loss_raises(total_too: bool, earlier_step: bool) -> None:
    """At once: already the first would solve a problem of a single task."""
    net = LayerNet(GradVac())
    if earlier_step:
        net(inputs()).backward()
    before = net.surgery.result
    losses = net.losses(inputs())
    if total_too:
        net.surgery.total(losses)
    with (
        assert_untouched(net.surgery, net.trunk),
        pytest.raises(RuntimeError, match=r"loss of task 1 alone.*surgery\.total\(losses\)\.backward\(\), with None"),
    ):
        losses[1].backward(retain_graph=True)
    assert net.surgery.result is before
    net.surgery.total(losses).backward()
    assert net.surgery.result is not before


def test_a_single_loss_that_is_meant_to_be_alone() -> None:
    """As `total` says; or because the others miss the features."""
    net = LayerNet(GradVac())
    one = net.losses(inputs())
    net.surgery.total([None, one[1], None])
    net.losses(inputs())  # in between
    one = net.losses(inputs())
    net.surgery.total([None, one[1], None])
    one[1].backward()
    assert net.surgery.result.weights.tolist() == [0, 1, 0]
    two = net.losses(inputs())
    total = net.surgery.total([None, two[1], None])
    net.losses(inputs())
    (total / 2).backward()
    assert net.surgery.result.weights.tolist() == [0, 1, 0]
    elsewhere = torch.ones((), dtype=torch.float64, requires_grad=True)
    net.surgery.total([net.losses(inputs())[0], elsewhere * 1, elsewhere * 2]).backward()
    assert net.surgery.result.weights.tolist() == [1, 0, 0]


def test_the_backward_pass_of_an_earlier_total_raises() -> None:
    """It would be solved with what the last `total` was told; its heads get no gradients either."""
    net = LayerNet(GradVac())
    earlier = net(inputs())
    a, _, _ = net.losses(inputs())
    last = net.surgery.total([a, None, None])
    error = r"earlier total; call each total's backward\(\) before the next total"
    for wrong in (earlier, 2 * earlier):
        with assert_untouched(net.surgery, net.trunk), pytest.raises(RuntimeError, match=error):
            wrong.backward(retain_graph=True)
        assert net.heads[1].weight.grad is None
    assert net.surgery.result is None
    last.backward()
    assert net.surgery.result.weights.tolist() == [1, 0, 0]


def test_a_sum_of_two_totals_raises() -> None:
    """When the earlier one's turn comes, after the last one's step."""
    net = LayerNet(GradVac())
    with pytest.raises(RuntimeError, match="backward of an earlier total"):
        (net(inputs()) + net(inputs())).backward()


def test_accumulation_over_batches() -> None:
    """Forward, `total`, backward, each time; with totals that are not meant for backward in evaluation."""
    net, x = LayerNet(MGDA()), [inputs() for _ in range(3)]
    expected = []
    for each in x:
        net.zero_grad()
        net(each).backward()
        expected.append([p.grad.clone() for p in net.parameters()])
    net.zero_grad()
    for each in x:
        total = net(each)
        with torch.no_grad():
            net(inputs())
        net.eval()
        net(inputs())
        net.train()
        total.backward()
    assert_grads(net.parameters(), [sum(each) for each in zip(*expected, strict=True)])


def test_losses_of_two_forward_passes_in_one_total() -> None:
    """Each forward pass is combined by itself, both with what `total` was told."""
    net, x = LayerNet(MGDA()), [inputs(), inputs()]
    features = [net.trunk(each).detach().requires_grad_() for each in x]
    for z in features:
        net.surgery.total([*net.head_losses(net.surgery(z))[:2], None]).backward()
    both = [z.detach().clone().requires_grad_() for z in features]
    (a0, a1, _), (b0, b1, _) = (net.head_losses(net.surgery(z)) for z in both)
    net.surgery.total([a0 + b0, a1 + b1, None]).backward()
    assert_grads(both, [z.grad for z in features])


def test_gradients_of_trunk_and_heads_apart() -> None:
    """Two passes from one `total`, of which one goes through the layer."""
    net, x = LayerNet(MGDA()), inputs()
    net(x).backward()
    total = net(x)
    trunk = torch.autograd.grad(total, [*net.trunk.parameters()], retain_graph=True)
    heads = torch.autograd.grad(total, [*net.heads.parameters()])
    assert_grads([*net.trunk.parameters(), *net.heads.parameters()], [*trunk, *heads])


def test_a_forward_pass_in_between_does_not_take_the_losses_away() -> None:
    method = GradNorm(scale_heads=False)
    net = LayerNet(method)
    losses = net.losses(inputs())
    total = net.surgery.total(losses)
    net.losses(inputs())
    total.backward()
    assert method.initial_losses.tolist() == [float(x.detach()) for x in losses]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_around_total(use_reentrant: bool) -> None:
    """The `total` that is repeated within backward is the same step's; two of three tasks miss the features."""
    net, elsewhere = LayerNet(GradVac()), torch.ones((), dtype=torch.float64, requires_grad=True)

    def total(x: Tensor) -> Tensor:
        return net.surgery.total([net.losses(x)[0], elsewhere * 1, elsewhere * 2])

    for _ in range(2):
        with set_checkpoint_early_stop(False):  # or else it would stop short of `total`
            checkpoint(total, inputs().requires_grad_(), use_reentrant=use_reentrant).backward()
        assert net.surgery.result.weights.tolist() == [1, 0, 0]
    assert net.surgery.method.rng[1] == 2


def test_several_layers_in_one_model() -> None:
    """Each one's `total` says who is absent: a batch of one task is none of a single loss."""
    net = LayerNet(MGDA())
    first, second = FeatureSurgery(MGDA(), num_tasks=2), FeatureSurgery(MGDA(), num_tasks=2)
    z = net.trunk(inputs())
    loss = (first(z)[0] * second(2 * z)[0]).sum()
    for surgery in (first, second):
        total = surgery.total([loss, None])
    total.backward()
    assert first.result.weights.tolist() == second.result.weights.tolist() == [1, 0]


def test_batched_gradients_raise() -> None:
    net = LayerNet(GradVac())
    params = [*net.trunk.parameters()]
    losses = torch.stack(net.losses(inputs()))
    with assert_untouched(net.surgery, net.trunk), pytest.raises(RuntimeError, match=r"batched.*is_grads_batched"):
        torch.autograd.grad(losses, params, torch.eye(3).double(), is_grads_batched=True, retain_graph=True)
    with assert_untouched(net.surgery, net.trunk), pytest.raises(RuntimeError, match=r"batched.*is_grads_batched"):
        torch.func.vmap(lambda v: torch.autograd.grad(losses, params, v, retain_graph=True))(torch.eye(3).double())
    assert net.surgery.result is None
    losses.sum().backward()


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.vmap])
def test_transforms_raise_in_training(transform: Callable[..., Any]) -> None:
    """And none of them skips the surgery silently; in evaluation they pass."""
    net, x = LayerNet(GradVac()), inputs()
    with assert_untouched(net), pytest.raises(RuntimeError, match=r"torch\.func"):
        transform(lambda x: torch.stack(net.losses(x)))(x.unsqueeze(0) if transform is torch.func.vmap else x)
    net.eval()
    transform(lambda x: torch.stack(net.losses(x)))(x.unsqueeze(0) if transform is torch.func.vmap else x)


def test_weighting_for_another_number_of_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match="num_tasks: UncertaintyWeighting is for 3 tasks, found 2"):
        fastmtl.FeatureSurgery(UncertaintyWeighting(3), num_tasks=2)
