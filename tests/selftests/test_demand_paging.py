"""After tools/testing/selftests/kvm/demand_paging_test.c.

It requires of userspace: memory whose pages are not there is registered with userfaultfd; each page that a vCPU touches is filled
with a copy from a prototype, once, by a thread beside the vCPUs, whose KVM_RUN waits in the kernel and ends with nothing but the
guest's own exit. One vCPU or more, each with memory of its own or all with the same; a userfaultfd for each, or one.

Here faults.Pager is that thread. Left out: minor faults (UFFDIO_CONTINUE), which it does not do.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
from guests import stress
from memory_guest import PAGE, Guest

from kvmexit.faults import Pager

GPA = 0x1000_0000


@pytest.mark.usefixtures("uffd")
@pytest.mark.parametrize(
    ("vcpus", "pagers", "partition", "source", "window"),
    [
        (1, 1, True, "bytes", PAGE), (1, 1, True, "callable", 16 * PAGE), (2, 1, True, "callable", PAGE),
        (2, 1, False, "bytes", PAGE), (2, 1, False, "callable", 16 * PAGE), (2, 2, True, "bytes", 16 * PAGE),
        (2, 2, False, "callable", PAGE),
    ],
)  # fmt: skip
def test_demand_paging(vm, vcpus, pagers, partition, source, window):
    """Every other page is read, then the others are written to: what is there is the prototype's, and what was written."""
    pages = max(stress(1024), 64) // 32 * 32
    size = pages * PAGE * vcpus
    part = size // pagers
    slots = [vm.memory.add(GPA + n * part, part) for n in range(pagers)]
    guests = [Guest(vm, id) for id in range(vcpus)]
    pattern = b"\xab" * part
    given = pattern if source == "bytes" else lambda offset, count: pattern[offset : offset + count]
    paging = [Pager(slot, given, window=window) for slot in slots]

    def touch(guest):
        """-> what it read"""
        own = size // vcpus if partition else size
        gpa = GPA + guest.vcpu.id * own * partition
        total = guest.add_up(gpa, own, 2 * PAGE)
        guest.write(gpa + PAGE, own - PAGE, 2 * PAGE)
        return total, own // PAGE // 2

    with ThreadPoolExecutor(vcpus) as pool:
        results = list(pool.map(touch, guests))
    for total, count in results:
        assert total == count * 0xABABABABABABABAB % (1 << 64)
    for pager in paging:
        assert (pager.stats.pages, pager.stats.bytes, pager.stats.missing) == (part // PAGE, part, 0)
        assert pager.stats.fetches == part // window
        assert pager.errors == []
        pager.close()
    for n in range(0, size // PAGE):
        gpa = GPA + n * PAGE
        first = gpa.to_bytes(8, "little") if n % 2 else b"\xab" * 8
        assert vm.memory.read(gpa, PAGE) == first + b"\xab" * (PAGE - 8)
