"""The benchmark of densities: what it computes itself, and what it makes of figures."""

import pytest

from benchmarks import density_anomalies, density_likelihoods
from calotype.density.ranking import Estimate


def test_the_ode_finds_the_density_of_a_gaussian():
    rows = density_likelihoods.gaussian()
    assert len(rows) == 4 and all(row.met for row in rows)
    assert [row.value < 0.02 for row in rows if "exact" in row.name] == [True, True]


def test_the_combination_is_held_against_the_best_mean_and_not_the_best_of_each_run():
    runs = [
        {"flow": Estimate(0.9, 0.8, 0.95), "knn": Estimate(0.7, 0.6, 0.8), "combination": Estimate(0.85, 0.8, 0.9)},
        {"flow": Estimate(0.8, 0.7, 0.85), "knn": Estimate(0.9, 0.8, 0.95), "combination": Estimate(0.95, 0.9, 0.97)},
    ]
    rows = {row.name: row for row in density_anomalies.of_scores("digits", runs)}
    assert rows["digits: combination"].value == pytest.approx(0.9) and rows["digits: combination"].goal == 0.9
    lead = rows["digits: combination - best"]
    assert lead.value == pytest.approx(0.05) and lead.how == "best: flow"


def test_false_alarms_are_counted_over_all_runs():
    rows = density_anomalies.alarms([{"checked": 0.04, "alarms": 0.08}, {"checked": 0.07, "alarms": 0.07}])
    assert [row.value for row in rows] == [pytest.approx(0.5), pytest.approx(2.5)]
    assert [row.met for row in rows] == [True, False]


def test_the_same_pictures_lie_in_a_folder_of_their_own(tmp_path):
    (tmp_path / "all/a").mkdir(parents=True)
    for name in ("a/1.png", "a/2.png", "a/3.png"):
        (tmp_path / "all" / name).write_bytes(name.encode())
    chosen = [tmp_path / "all/a/1.png", tmp_path / "all/a/3.png"]
    folder = density_anomalies.linked(tmp_path / "some", chosen, tmp_path / "all")
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png")) == ["a/1.png", "a/3.png"]
    assert (folder / "a/3.png").read_bytes() == b"a/3.png"
