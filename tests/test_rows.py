"""The row store's two fillers, and masks."""

from __future__ import annotations

import pytest
import torch

from fastmtl.parameters import find_leaves
from fastmtl.rows import Rows, ThroughBackward, ThroughGrad, as_rows, constant_mask
from tests import nets


@pytest.mark.parametrize("trunk", [name for name in nets.TRUNKS if name != "reentrant"])
def test_fillers_agree_and_equal_autograd(trunk: str) -> None:
    model = nets.net(trunk)
    params = [*model.parameters()]
    losses = model.losses(torch.randn(4, 5, dtype=torch.float64))
    expected = nets.task_gradients(losses, params)
    for p in params:
        p.grad = torch.full_like(p, 7.0)
    for through in (ThroughGrad, ThroughBackward):
        with through(params) as run:
            found = [run([x], [None], True) for x in losses]
        for f, e in zip(found, expected, strict=True):
            for a, b in zip(f, e, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert all((p.grad == 7).all() for p in params)


def test_reentrant_checkpointing_hides_from_autograd_grad_but_not_from_backward() -> None:
    model = nets.net("reentrant")
    losses = model.losses(torch.randn(4, 5, dtype=torch.float64))
    assert "CheckpointFunctionBackward" in {kind.__name__ for kind in find_leaves(losses)[1]}
    params = [*model.trunk.parameters()]
    plain = nets.net("mlp")
    plain.load_state_dict(dict(zip(plain.state_dict(), model.state_dict().values(), strict=True)))
    torch.manual_seed(0)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = nets.task_gradients(plain.losses(x), plain.trunk.parameters())
    with ThroughBackward(params) as run:
        for loss, e in zip(model.losses(x), expected, strict=True):
            for a, b in zip(run([loss], [None], True), e, strict=True):
                torch.testing.assert_close(a, b)


def test_cotangents_weigh_the_outputs() -> None:
    model = nets.mlp()
    params = [*model.trunk.parameters()]
    losses = model.losses(torch.randn(4, 5, dtype=torch.float64))
    weights = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    expected = nets.weighted_sum(nets.task_gradients(losses, params), weights)
    for through in (ThroughGrad, ThroughBackward):
        with through(params) as run:
            for a, b in zip(run(losses, list(weights), True), expected, strict=True):
                torch.testing.assert_close(a, b)


def test_backward_filler_puts_gradients_back_after_an_error() -> None:
    model = nets.mlp()
    params = [*model.parameters()]
    loss = model.losses(torch.randn(4, 5, dtype=torch.float64))[0]
    before = [torch.randn_like(p) for p in params]
    for p, grad in zip(params, before, strict=True):
        p.grad = grad

    def twice() -> None:
        with ThroughBackward(params) as run:
            run([loss], [None], False)
            run([loss], [None], False)

    with pytest.raises(RuntimeError, match="second time"):
        twice()
    assert all(p.grad is grad for p, grad in zip(params, before, strict=True))


def test_no_parameters() -> None:
    loss = torch.ones((), requires_grad=True) * 2
    with ThroughGrad([]) as run:
        assert list(run([loss], [None], False)) == []


# ---- Rows ------------------------------------------------------------------------------------------------------------


def test_by_task_orders_parameter_by_parameter() -> None:
    a, b, c = torch.randn(3, 2)
    rows = Rows.by_task([[a, None], None, [b, c]], [1, 0], 2)
    assert rows.grads == [a, None, b, None, None, c]
    assert (rows.num_tasks, rows.num_params, rows.reached()) == (3, 2, [0, 1])
    assert rows.present() == [[False, False, True], [True, False, True]]
    assert torch.equal(rows.mask(), torch.tensor(rows.present()))


def test_no_mask_where_every_task_reaches_every_group() -> None:
    a = torch.randn(2)
    assert as_rows(torch.randn(3, 4)).mask() is None
    assert Rows.by_task([[a, a], [a, a]]).mask() is None
    assert Rows.by_task([[a, None], [None, a]]).mask() is None  # one group: both reach it
    assert Rows.by_task([[a, None], [None, a]], [0, 1], 2).mask().tolist() == [[True, False], [False, True]]


def test_masks_are_kept_and_told_apart() -> None:
    device = torch.device("cpu")
    one = constant_mask([[True, False]], device)
    assert constant_mask([[True, False]], device) is one
    assert constant_mask([[False, True]], device).tolist() == [[False, True]]
    for i in range(600):
        assert constant_mask([[bool(i >> b & 1) for b in range(10)]], device).tolist()[0][0] == bool(i & 1)


def test_as_rows_copies_nothing() -> None:
    jacobian = torch.randn(3, 4)
    assert as_rows(jacobian).grads[0] is jacobian
    rows = as_rows([[jacobian[0], None, jacobian[2]]])
    assert as_rows(rows) is rows
    mixed = as_rows([jacobian, [None, jacobian[1], None]])
    assert not mixed.stacked
    assert mixed.grads[0].data_ptr() == jacobian.data_ptr()


def test_a_list_of_flat_gradients_is_ambiguous() -> None:
    with pytest.raises(ValueError, match=r"torch\.stack"):
        as_rows([torch.randn(5), torch.randn(5), torch.randn(5)])
