import numpy as np
import pytest

from medtrain.sampling import Stream, generator, permutation


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 3), (2, 3), (6, 1)])
def test_ranks_share_every_epoch_without_overlap(world: int, accumulate: int) -> None:
    length, batch, steps = 10, 12, 5  # six epochs, batches straddle epochs
    seen = []
    for rank in range(world):
        stream = Stream(0, length, batch, accumulate, world, rank)
        seen += [stream.epoch_and_index(n) for n in range(steps * batch // world)]
    assert sorted(seen) == [(epoch, index) for epoch in range(6) for index in range(10)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_has_the_same_samples_on_any_number_of_ranks(world: int) -> None:
    batch, step = 8, 3
    samples = set()
    for rank in range(world):
        stream = Stream(0, 7, batch, 2, world, rank, first_step=step)
        samples |= {stream.epoch_and_index(n) for n in range(batch // world)}
    assert samples == {divmod(p, 7) for p in range(step * batch, (step + 1) * batch)}


def test_a_later_start_continues_the_stream() -> None:
    whole, late = Stream(0, 7, 4, 2, 2, 1), Stream(0, 7, 4, 2, 2, 1, first_step=5)
    assert [whole.position(n + 10) for n in range(9)] == [late.position(n) for n in range(9)]


def test_random_numbers_are_a_function_of_seed_epoch_index() -> None:
    assert generator(1, 2, 3).random() == generator(1, 2, 3).random()
    values = {generator(s, e, k).random() for s in range(3) for e in range(3) for k in range(3)}
    assert len(values) == 27
    assert sorted(permutation(1, 0, 9)) == list(range(9))
    assert not np.array_equal(permutation(1, 0, 9), permutation(1, 1, 9))
