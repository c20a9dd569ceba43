"""Several changes of routes as one: vm.swap_routes()."""

import pytest
from guests import stress
from processes import in_thread

import kvmexit
from kvmexit import native
from kvmexit.testing import ScriptedVM, hlt, mmio_write, pio_out

PAGE = 4096


def ports_taken(vm, *ports):
    """Which of these ports somebody answers, as a vCPU finds it."""
    vcpu = vm.create_vcpu(ports_taken.id, [*(pio_out(port, b"x") for port in ports), hlt()])
    ports_taken.id += 1
    returned = []
    while not isinstance(exit := vcpu.run(), kvmexit.Hlt):
        returned.append(exit.port)
    return [port for port in ports if port not in returned]


ports_taken.id = 0


def test_all_of_it_comes_at_the_end(scripted):
    """Added and removed; until then everything is as before."""
    old = scripted.on_pio(0x80, 1, native.Ignore())
    with scripted.swap_routes():
        old.remove()
        scripted.on_pio(0x81, 1, native.Ignore())

        @scripted.on_pio(0x82)
        def on(vcpu, io):
            pass

        assert ports_taken(scripted, 0x80, 0x81, 0x82) == [0x80]
    assert ports_taken(scripted, 0x80, 0x81, 0x82) == [0x81, 0x82]


def test_an_exception_changes_nothing(scripted):
    """And the routes made in the block are none."""
    old = scripted.on_pio(0x80, 1, native.Ignore())
    route = None

    def give_up():
        nonlocal route
        with scripted.swap_routes():
            route = scripted.on_pio(0x81, 1, native.Ignore())
            old.remove()
            raise KeyError

    with pytest.raises(KeyError):
        give_up()
    assert ports_taken(scripted, 0x80, 0x81) == [0x80]
    route.remove()
    old.remove()
    assert ports_taken(scripted, 0x80, 0x81) == []


def test_one_in_another_is_part_of_it(scripted):
    """What the inner one gave up is not in the outer one."""

    def give_up():
        with scripted.swap_routes():
            scripted.on_pio(0x82, 1, native.Ignore())
            raise KeyError

    with scripted.swap_routes():
        with scripted.swap_routes():
            route = scripted.on_pio(0x80, 1, native.Ignore())
            scripted.on_pio(0x81, 1, native.Ignore())
        with pytest.raises(KeyError):
            give_up()
        route.remove()
        scripted.on_pio(0x83, 1, native.Ignore())
        assert ports_taken(scripted, 0x80, 0x81, 0x82, 0x83) == []
    assert ports_taken(scripted, 0x80, 0x81, 0x82, 0x83) == [0x81, 0x83]


def test_blocks_that_end_out_of_order_lose_nothing(scripted):
    """As two coroutines' do: each comes into force at its own end, and afterwards changes come at once again."""
    first, second = scripted.swap_routes(), scripted.swap_routes()
    first.__enter__()
    scripted.on_pio(0x80, 1, native.Ignore())
    second.__enter__()
    scripted.on_pio(0x81, 1, native.Ignore())
    first.__exit__(None, None, None)
    assert ports_taken(scripted, 0x80, 0x81) == [0x80]
    second.__exit__(None, None, None)
    scripted.on_pio(0x82, 1, native.Ignore())
    assert ports_taken(scripted, 0x80, 0x81, 0x82) == [0x80, 0x81, 0x82]


def test_the_order_is_that_of_the_calls(scripted):
    """Of equals the newest first, as ever."""
    asked = []
    with scripted.swap_routes():
        for name in "abc":
            scripted.on_pio(0x80, 1, lambda vcpu, io, name=name: asked.append(name) or kvmexit.PASS)
    ports_taken(scripted, 0x80)
    assert asked == ["c", "b", "a"]


def test_other_threads_changes_come_at_once(scripted):
    """A block is its thread's."""
    with scripted.swap_routes():
        scripted.on_pio(0x80, 1, native.Ignore())
        in_thread(lambda: scripted.on_pio(0x81, 1, native.Ignore())).join()
        assert ports_taken(scripted, 0x80, 0x81) == [0x81]
    assert ports_taken(scripted, 0x80, 0x81) == [0x80, 0x81]


def test_a_block_is_used_once(scripted):
    """Twice is an error that says what to do."""
    swap = scripted.swap_routes()
    with swap:
        pass
    with pytest.raises(RuntimeError, match="call it again"), swap:
        pass


def test_ten_thousand_routes_each_find_theirs():
    """Added in one swap."""
    with ScriptedVM() as vm:
        counters = [native.Counter() for _ in range(10_000)]
        with vm.swap_routes():
            for i, counter in enumerate(counters):
                vm.on_mmio(i * PAGE, 8, counter)
            vm.on(kvmexit.Mmio, native.Ignore())
        vcpu = vm.create_vcpu(0, [mmio_write(i * PAGE, b"x") for i in range(0, 10_000, 7)] + [hlt()])
        assert isinstance(vcpu.run(), kvmexit.Hlt)
        assert [counter.writes for counter in counters] == [int(i % 7 == 0) for i in range(10_000)]


def test_a_device_that_moves_is_never_at_neither_place(scripted):
    """Seen by a vCPU that accesses it all the time: one of the two routes always answers."""
    missed = native.Counter()
    scripted.on(kvmexit.Io, native.Ignore())
    scripted.on(kvmexit.Io, missed)
    route = scripted.on_pio(0x80, 1, native.Ignore())
    vcpu = scripted.create_vcpu(0, [pio_out(0x80, b"x")], repeat=1 << 40, keep=False)
    ended = []
    thread = in_thread(lambda: ended.append(vcpu.run()))
    for _ in range(stress(300)):
        seen = vcpu.stats.exits
        with scripted.swap_routes():
            route.remove()
            route = scripted.on_pio(0x80, 1, native.Ignore())
        while vcpu.stats.exits == seen:
            pass
    vcpu.kick()
    thread.join(60)
    assert ended[0].cause == "kick"
    assert missed.writes == 0
