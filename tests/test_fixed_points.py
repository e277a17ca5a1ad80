"""The table of docs/objectives.md: what it shows, not how it is printed."""
from studies.fixed_points import OBJECTIVES, table


def test_every_objective_rests_at_the_teacher_and_the_control_does_not():
    """And near the teacher each points where the exact KL points, which a top-k sum differentiated directly does not."""
    lines = table()
    assert len(lines) == 2 + len(OBJECTIVES) + 1
    rows = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in (line.split('|') for line in lines[2:])}
    for name in OBJECTIVES:
        at_rest, near, half = rows[name]
        assert at_rest == '0' and float(near) >= 0.97 and float(half) >= 0.9, name
    at_rest, _, half = rows['control: direct top-16']
    assert float(at_rest) > 1e-2 and float(half) < 0.5
