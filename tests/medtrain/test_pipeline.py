"""What the loader does with DALI's batches on a GPU, without one."""

import weakref

import pytest
import torch

from medtrain.pipeline import BatchHolder


class Event:
    """Stands in for an event of the device, which is as far as the test says."""

    done = 0
    made = 0
    waited: list[int]

    def __init__(self) -> None:
        self.number = Event.made
        Event.made += 1

    def record(self) -> None:
        """Asked of the device."""

    def query(self) -> bool:
        return self.number < Event.done

    def synchronize(self) -> None:
        Event.waited.append(self.number)
        Event.done = max(Event.done, self.number + 1)


def test_a_batch_is_held_until_the_device_has_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.done = Event.made = 0
    Event.waited = []
    kept, seen = BatchHolder(), []
    for number in range(3):
        batch = torch.full((2,), float(number))
        seen.append(weakref.ref(batch))
        assert kept.take(batch) is batch
        del batch
    assert [alive() is not None for alive in seen] == [True, True, True]  # the step has let go of them, the device not
    assert Event.waited == []
    Event.done = 1  # the first step is over
    seen.append(weakref.ref(kept.take(torch.full((2,), 3.0))))
    assert [alive() is not None for alive in seen] == [False, True, True, True]
    kept.take(torch.full((2,), 4.0))  # a third old one: wait for the oldest, not for all
    assert seen[1]() is None
    assert seen[2]() is not None
    assert Event.waited == [0, 1]
