"""Grids of pictures, in the tab Generate."""

import pytest
from studios import EVIL, coloured, furthest, of_each_kind

from calotype.demo import grid
from calotype.demo.studio import Progress
from calotype.errors import UserError


@pytest.fixture(scope="module")
def studio():
    return coloured()


@pytest.fixture(scope="module")
def models():
    return of_each_kind()


def test_cells_of_a_grid_are_the_pictures_drawn_alone(studio):
    base = studio.request("red", 1, 5, 3, 2)
    values = {"labels": ["red", "blue"], "seeds": 3, "steps": "2, 3", "guidance": "1; 2"}
    sides = [grid.axis(studio, base, name, values) for name in ("labels", "seeds")]
    cells = grid.cells_of(base, *sides)
    *_, last = studio.develop_cells(cells)
    assert last.done == last.total == 3  # one batch
    for i, label in enumerate(["red", "blue"]):
        for j in range(3):
            alone = studio.pipe(label, seed=5 + j, num_inference_steps=3, guidance_scale=2.0).images[0]
            assert furthest(last.images[3 * i + j], alone) <= 1
    sides = [grid.axis(studio, base, name, values) for name in ("steps", "guidance")]
    seen = list(studio.develop_cells(grid.cells_of(base, *sides)))
    assert [progress.done for progress in seen][-1] == seen[0].total == 2 + 2 + 3 + 3
    assert seen[0].images[1:] == [None] * 3
    alone = studio.pipe("red", seed=5, num_inference_steps=2, guidance_scale=2.0).images[0]
    assert furthest(seen[-1].images[1], alone) <= 1


def test_grids_too_large_or_of_nothing_are_refused(studio):
    base = studio.request("red", 1, 0, 3, 2)
    for name, value, reason in (
        ("labels", [], "from 1 to 12"),
        ("labels", ["cat"], "cat"),
        ("labels", "red", "from 1 to 12"),
        ("steps", "1,2,x", "must be numbers"),
        ("steps", "", "from 1 to 12"),
        ("steps", "1," * 13, "from 1 to 12"),
        ("guidance", "nan", "not a number"),
        ("seeds", None, "not a number"),
        ("colours", [], "nothing that varies"),
    ):
        with pytest.raises(UserError, match=reason):
            grid.axis(studio, base, name, {name: value})
    long = grid.axis(studio, base, "steps", {"steps": "200,201,199,198,197,196,195,194,193,192,191,190"})
    with pytest.raises(UserError, match="2,145 steps"):
        list(studio.develop_cells(grid.cells_of(base, long, grid.Axis("seed", [1], ["seed 1"]))))
    many = grid.axis(studio, base, "steps", {"steps": "1," * 12})
    with pytest.raises(UserError, match="48 pictures"):
        list(studio.develop_cells(grid.cells_of(base, many, grid.Axis("seed", [1, 2, 3, 4], list("1234")))))


def test_titles_of_a_grid_stay_text(studio):
    base = studio.request("red", 1, 0, 3, 2)
    down = grid.axis(studio, base, "labels", {"labels": [EVIL]})
    page = grid.table(down, grid.axis(studio, base, "seeds", {"seeds": 1}), Progress(1, 2, [None]))
    assert EVIL not in page and "&lt;img" in page and 'aria-valuenow="50"' in page


def test_what_can_vary_follows_the_model(models):
    assert grid.axes_of(models["class"]) == ["labels", "seeds", "steps", "guidance"]
    assert grid.axes_of(models["none"]) == ["seeds", "steps"]
    assert grid.axes_of(models["guide"]) == ["seeds", "steps", "guidance"]
    prompts = grid.axis(models["text"], models["text"].any_request(), "labels", {"labels": " a red star \n\na disc"})
    assert prompts.values == ["a red star", "a disc"]
