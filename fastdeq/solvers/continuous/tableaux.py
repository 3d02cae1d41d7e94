"""Runge–Kutta methods as tables of coefficients; `runge_kutta.py` steps them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tableau:
    """An explicit method whose last stage is the first of the next step (first same as last).

    a: the rows below the diagonal; the last row is also the weights of the solution.
    error: weights of the difference to the embedded method, one for every stage.
    order: order of the propagated solution.
    Abscissae are not needed: dz/dt = f(z) − z does not depend on t.
    """

    a: tuple[tuple[float, ...], ...]
    error: tuple[float, ...]
    order: int


# Tsitouras 2011, "Runge–Kutta pairs of order 5(4) satisfying only the first column simplifying
# assumption", Table 1; error weights are the published b − b̂.
TSIT5 = Tableau(
    a=(
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (
            5.86145544294642,
            -12.92096931784711,
            8.159367898576159,
            -0.071584973281401,
            -0.028269050394068383,
        ),
        (
            0.09646076681806523,
            0.01,
            0.4798896504144996,
            1.379008574103742,
            -3.290069515436081,
            2.324710524099774,
        ),
    ),
    error=(
        -0.00178001105222577714,
        -0.0008164344596567469,
        0.007880878010261995,
        -0.1447110071732629,
        0.5823571654525552,
        -0.45808210592918697,
        1 / 66,
    ),
    order=5,
)

# Bogacki & Shampine 1989, "A 3(2) pair of Runge–Kutta formulas".
BS3 = Tableau(
    a=((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    error=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
    order=3,
)
