"""The search for a micro-batch, with made-up times and memory."""

from headway.launcher.plan.micro_batch.search import ROUNDS, WARM_UP, Timed, ladder, search


class Machine:
    """Made-up times and memory. `rates`: size -> tokens/s; one byte per sequence; quartiles are `spread` away."""

    def __init__(self, rates, *, dies_at=None, planned=False, spread=0.0):
        self.rates, self.dies_at, self.planned, self.spread = rates, dies_at, planned, spread
        self.tried, self.clock_s = [], 0.0

    def planned_bytes(self, micro_batch):
        return float(micro_batch) if self.planned else None

    def run(self, micro_batch):
        size = micro_batch
        self.tried.append(size)
        if size == self.dies_at:
            return "out of memory"
        seconds = [size / (self.rates[size] * (1 + self.spread * k)) for k in (-2, -1, 0, 1, 2)]
        self.clock_s += (WARM_UP + ROUNDS) * size / self.rates[size]
        return Timed(seconds=seconds, memory_bytes=float(size))

    def search(self, *, limit=1e9, seconds=1e9):
        return search(
            sorted(self.rates),
            self,
            tokens_per_sequence=1,
            limit_bytes=limit,
            seconds_left=lambda: seconds - self.clock_s,
            say=lambda trial: None,
        )


def test_the_smallest_within_two_per_cent_of_the_fastest_is_chosen():
    machine = Machine({1: 50.0, 2: 98.5, 4: 100.0, 8: 100.0, 16: 100.0, 32: 500.0})
    found = machine.search()
    assert found.micro_batch == 2
    # 4 and 8 are at most two per cent faster than the best before them; larger sizes are not tried
    assert machine.tried == [1, 2, 4, 8]
    assert "within 2% of the fastest (4)" in found.why and "larger ones are not faster" in found.why


def test_the_search_continues_while_sizes_are_faster():
    machine = Machine({1: 10.0, 2: 20.0, 4: 30.0, 8: 33.0})
    assert machine.search().micro_batch == 8 and machine.tried == [1, 2, 4, 8]


def test_one_size_that_is_not_faster_does_not_end_the_search():
    machine = Machine({1: 10.0, 2: 9.0, 4: 20.0, 8: 40.0})
    assert machine.search().micro_batch == 8


def test_a_gain_within_the_spread_does_not_count():
    rates = {1: 100.0, 2: 104.0, 4: 106.0, 8: 500.0}
    noisy = Machine(rates, spread=0.1)
    noisy.search()
    assert noisy.tried == [1, 2, 4]
    steady = Machine(rates)
    assert steady.search().micro_batch == 8 and steady.tried == [1, 2, 4, 8]


def test_a_size_that_runs_out_of_memory_ends_the_search_and_is_not_chosen():
    machine = Machine({1: 10.0, 2: 20.0, 4: 40.0, 8: 80.0}, dies_at=4)
    found = machine.search()
    assert found.micro_batch == 2 and machine.tried == [1, 2, 4]
    assert [(t.micro_batch, t.fits, t.why_not) for t in found.trials[1:]] == [
        (2, True, None),
        (4, False, "out of memory"),
    ]
    assert "4 does not fit" in found.why


def test_a_size_that_runs_but_leaves_no_room_for_the_optimizer_does_not_fit():
    machine = Machine({1: 10.0, 2: 20.0, 4: 40.0, 8: 80.0})
    found = machine.search(limit=2.5)
    assert found.micro_batch == 2 and machine.tried == [1, 2, 4]
    assert found.trials[-1].why_not and "optimizer" in found.trials[-1].why_not


def test_a_size_that_the_plan_excludes_is_not_tried():
    machine = Machine({1: 10.0, 2: 20.0, 4: 40.0}, planned=True)
    found = machine.search(limit=2.5)
    assert found.micro_batch == 2 and machine.tried == [1, 2]
    assert found.trials[-1].memory_bytes == 4.0


def test_nothing_is_chosen_if_the_smallest_does_not_fit():
    found = Machine({1: 10.0, 2: 20.0}, dies_at=1).search()
    assert found.micro_batch is None and len(found.trials) == 1


def test_a_size_that_would_exceed_the_time_limit_is_not_tried():
    rates = {1: 1.0, 2: 1.5, 4: 2.0, 8: 4.0}
    machine = Machine(rates)
    # 7 s for one sequence, 9.3 s for two; four are expected to take 18.7 s
    found = machine.search(seconds=30.0)
    assert machine.tried == [1, 2] and found.micro_batch == 2 and "because the time was up" in found.why
    slow = Machine(rates)
    assert slow.search(seconds=0.0).micro_batch == 1 and slow.tried == [1]


def test_close_sizes_are_skipped():
    assert ladder([1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 24]) == [1, 2, 3, 5, 8, 12, 20]
    assert ladder([7]) == [7]
