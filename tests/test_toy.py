"""The toy of CAGrad and NashMTL: it is the published one, and the methods do on it what the papers report."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import toy

CAGRAD, NASH = toy.SETTINGS


def published(theta):
    """The two losses, as CAGrad's paper and code define them."""
    x, y = theta.unbind(-1)
    first = (0.5 * (-x - 7) - torch.tanh(-y)).abs().clamp(min=5e-6).log() + 6
    second = (0.5 * (-x + 3) + torch.tanh(-y) + 2).abs().clamp(min=5e-6).log() + 6
    first_bowl = ((-x + 7) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20
    second_bowl = ((-x - 7) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20
    up, down = torch.tanh(0.5 * y).clamp(min=0), torch.tanh(-0.5 * y).clamp(min=0)
    return torch.stack([first * up + first_bowl * down, second * up + second_bowl * down], -1)


def test_losses_and_gradients_are_the_published_ones():
    points = np.random.default_rng(0).uniform(-11, 11, (2000, 2))
    points[:20, 1] = 0  # where the halves meet
    points[20:40, 0] = 2 * np.tanh(points[20:40, 1]) - 7  # the ground of the first loss's valley
    theta = torch.tensor(points, requires_grad=True)
    expected = published(theta)
    rows = [torch.autograd.grad(expected[:, t].sum(), theta, retain_graph=True)[0] for t in range(2)]
    losses, jacobian = toy.evaluate(points)
    np.testing.assert_allclose(losses, expected.detach().numpy(), rtol=1e-12, atol=1e-12)
    away = np.abs(0.5 * (-points[:, 0] - 7) + np.tanh(points[:, 1])) > 1e-4  # from that ground: there 1 / u is rounding
    assert away.sum() > 1900
    np.testing.assert_allclose(jacobian[away], torch.stack(rows, 1).numpy()[away], rtol=1e-9, atol=1e-9)


def test_a_point_in_the_flat_of_the_valley_has_no_slope_there():
    """Closer than 5e-6, the logarithm is constant."""
    y = 1.0
    theta = torch.tensor([2 * np.tanh(y) - 7 + 4e-6, y], dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(published(theta)[0], theta)[0].numpy()
    np.testing.assert_allclose(toy.evaluate(theta.detach().numpy())[1][0], expected, rtol=1e-12)
    assert expected[0] == 0


def test_front_is_stationary_and_nothing_dominates_it():
    front = toy.pareto_set(21)
    losses, jacobian = toy.evaluate(front)
    share = np.linspace(0, 1, 21)
    weighted = np.einsum("kt,ktp->kp", np.stack([share, 1 - share], 1), jacobian)
    np.testing.assert_allclose(weighted, 0, atol=1e-12)
    ticks = np.linspace(-12, 12, 241)
    everywhere = toy.evaluate(np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2))[0]
    for point, p in zip(losses, share, strict=True):
        assert not (everywhere < point - 1e-9).all(-1).any()
        assert (everywhere @ [p, 1 - p]).min() >= point @ [p, 1 - p] - 1e-9  # it is that weighted sum's minimum
    assert (np.diff(losses[:, 0]) < 0).all()
    assert (np.diff(losses[:, 1]) > 0).all()
    assert np.abs(front[10] - [0, -8.3552]).max() < 1e-3  # as the papers have it
    np.testing.assert_allclose(toy.LEAST, everywhere.min(0), atol=1e-2)


def test_a_step_is_adams():
    theta = torch.tensor([[1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    theirs, ours, point = (
        torch.optim.Adam([theta], toy.LR, toy.BETAS, toy.EPS),
        toy.Adam(),
        theta.detach().numpy().copy(),
    )
    for grads in np.random.default_rng(0).normal(size=(20, 1, 2)):
        theta.grad = torch.from_numpy(grads)
        theirs.step()
        point = ours(point, grads)
    np.testing.assert_allclose(point, theta.detach().numpy(), rtol=1e-12)


def reached(name, setting, steps=None):
    return [p.reached for p in toy.run(name, [setting], steps)]


@pytest.mark.parametrize("name", ["MGDA", "NashMTL"])
def test_reach_the_front_from_everywhere(name):
    assert all(p.reached for p in toy.run(name, steps=35_000))


def test_cagrad_reaches_the_middle_if_losses_are_of_one_size():
    """As its paper has it: the minimum of the averaged loss from all three starts; not so with one loss a tenth."""
    for path in toy.run("CAGrad", [CAGRAD]):
        assert np.abs(path.points[-1] - [0, -8.3552]).max() < 0.2
    assert not reached("CAGrad", NASH)[2]


def test_pcgrad_ends_on_the_front_where_it_happens_to():
    """As CAGrad's paper has it, if it gets there; with one loss a tenth, not from above the other's valley."""
    found = toy.run("PCGrad", [NASH])
    assert [p.reached for p in found[1:]] == [True, False, True, True]
    x = [p.points[-1][0] for p in found[1:] if p.reached]
    assert max(x) - min(x) > 5


def test_the_summed_loss_stays_in_the_valleys():
    """From two of three starts, as CAGrad's paper has it; with one loss a tenth from one, above the other's valley."""
    assert reached("Sum", CAGRAD, 35_000) == [False, True, False]
    found = toy.run("Sum", [NASH])
    assert [p.reached for p in found[1:]] == [True, False, True, True]
    x, y = found[2].points[-1]
    assert y > 0.5
    assert abs(7 - 2 * np.tanh(y) - x) < 0.5  # on the ground of the second loss's valley


def test_weights_learned_from_losses_do_not_help():
    """The valley is a matter of direction."""
    above = toy.Setting("", ((9.0, 9.0),), NASH.scales, 10_000)
    assert reached("UncertaintyWeighting", above) == [False]


def test_scale_matters_to_mgda_and_not_to_nash():
    """NashMTL's path does not depend on the losses' scales; MGDA's end moves to the smaller loss's side."""
    start = ((-8.5, 7.5),)
    equal, scaled = (toy.Setting("", start, scales, 2_000) for scales in ((1.0, 1.0), (0.01, 1.0)))

    def apart(name):
        a, b = (toy.run(name, [setting])[0].points[-1] for setting in (equal, scaled))
        return np.abs(a - b).max()

    assert apart("NashMTL") < 1e-6
    assert apart("MGDA") > 0.1


def test_every_method_can_be_compared():
    for name in toy.methods():
        paths = toy.run(name, toy.SETTINGS[1:], steps=30 * toy.COARSER)
        assert len(paths) == 5
        assert all(np.isfinite(p.points).all() and len(p.points) == 4 for p in paths), name


def test_results_and_picture(tmp_path):
    paths = toy.run("Sum", steps=2_000) + toy.run("FAMO", [NASH], steps=500)
    toy.save(paths, tmp_path / "toy.csv")
    toy.draw(paths).savefig(tmp_path / "toy.png")
    assert (tmp_path / "toy.png").stat().st_size > 10_000
    table = toy.markdown(tmp_path / "toy.csv").splitlines()
    assert table[2:] == ["| `Sum` | 0 of 3 | 0 of 5 | –, –, –, –, – |", "| `FAMO` |  | 0 of 5 | –, –, –, –, – |"]


def test_docs_have_the_table_of_the_results():
    assert toy.markdown() in (Path(__file__).parent.parent / "docs" / "toy.md").read_text()
