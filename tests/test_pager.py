"""faults.Pager: pages that come when they are touched, from every kind of source, and what happens where they do not."""

import contextlib
import errno
import gc
import importlib.util
import mmap
import os
import random
import signal
import socket
import struct
import sys
import threading
import weakref

import pytest
from guests import CODE, load, stress
from processes import in_thread, leaks, python

import kvmexit
from kvmexit import Error, KvmError, faults
from kvmexit.faults import Pager, PagerError

pytestmark = pytest.mark.usefixtures("uffd")

PAGE = 4096
DATA = 0x1000_0000
PATTERN = b"".join(bytes([i % 251]) * 7 + random.Random(i).randbytes(PAGE - 7) for i in range(256))
PAGES = len(PATTERN) // PAGE

# rax += [rbx + rsi]; rsi = (rsi + rdx) & rdi; rcx times; out 0xf4, al
WALK = bytes.fromhex("48 03 04 33  48 01 d6  48 21 fe  48 ff c9  75 f1  e6 f4")


def plain(pages=PAGES):
    return mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Touch:
    """Reads memory as KVM does, in the kernel: without the GIL while it waits, and EFAULT where it cannot be had."""

    def __init__(self, memory):
        self.view = memoryview(memory)
        self.file = os.memfd_create("touch")

    def __call__(self, page, pages=1):
        n = os.pwrite(self.file, self.view[page * PAGE : (page + pages) * PAGE], page * PAGE)
        return os.pread(self.file, n, page * PAGE)

    def fails(self, page):
        with pytest.raises(OSError, match="Bad address") as caught:
            self(page)
        return caught.value.errno == errno.EFAULT

    def __del__(self):
        os.close(self.file)


def serve(read, write, data, stop_after=None, extra=b""):
    """The other side of a stream."""
    for number in range(sys.maxsize):
        question = os.read(read, 16)
        if len(question) < 16 or number == stop_after:
            break
        offset, size = struct.unpack("<QQ", question)
        answer = data[offset : offset + size] + extra
        while answer:
            answer = answer[os.write(write, answer) :]


@contextlib.contextmanager
def source(kind, data, tmp_path):
    """A source of each kind that has `data`."""
    if kind == "bytes":
        yield data
    elif kind == "callable":
        yield lambda offset, size: data[offset : offset + size]
    elif kind in ("path", "file", "descriptor"):
        path = tmp_path / "source"
        path.write_bytes(data)
        with open(path, "rb") as file:
            yield {"path": path, "file": file, "descriptor": file.fileno()}[kind]
    elif kind in ("socket", "nonblocking"):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(kind == "socket")
            thread = in_thread(lambda: serve(theirs.fileno(), theirs.fileno(), data))
            yield ours
            ours.shutdown(socket.SHUT_RDWR)
            thread.join()
    else:
        (read, their_write), (their_read, write) = os.pipe(), os.pipe()
        thread = in_thread(lambda: serve(their_read, their_write, data))
        yield read, write
        os.close(write)
        thread.join()
        for fd in (read, their_read, their_write):
            os.close(fd)


KINDS = ["bytes", "callable", "path", "file", "descriptor", "socket", "nonblocking", "pipes"]


@pytest.mark.parametrize("window", [PAGE, 64 << 10, 2 << 20])
@pytest.mark.parametrize("kind", KINDS)
def test_each_source_gives_its_bytes(kind, window, tmp_path):
    memory, before = plain(), b"x" * PAGE * 2
    touch, order = Touch(memory), random.Random(1).sample(range(PAGES), PAGES)
    with (
        source(kind, before + PATTERN, tmp_path) as given,
        Pager(memory, given, offset=len(before), window=window) as pager,
    ):
        for page in order:
            assert touch(page) == PATTERN[page * PAGE : (page + 1) * PAGE]
        assert pager.stats.missing == 0
        assert pager.stats.pages == PAGES
        assert pager.stats.bytes == len(PATTERN)
        assert pager.stats.fetches == len(PATTERN) // min(window, len(PATTERN))
        assert not pager.errors
    assert pager.closed
    assert memory[:] == PATTERN


@pytest.mark.parametrize("kind", KINDS)
def test_fill_all(kind, tmp_path):
    memory = plain()
    memory[3 * PAGE] = 0xAA  # a page that is there
    with source(kind, PATTERN, tmp_path) as given, Pager(memory, given) as pager:
        pager.prefetch(PAGE * 8, PAGE * 3)
        assert pager.stats.missing == PAGES - 3
        pager.fill_all()
        assert pager.stats.missing == 0
        assert pager.stats.pages == PAGES - 1
    expected = bytearray(PATTERN)
    expected[3 * PAGE : 4 * PAGE] = b"\xaa" + bytes(PAGE - 1)
    assert memory[:] == expected


def test_memory_of_a_file():
    fd = os.memfd_create("memory")
    os.ftruncate(fd, len(PATTERN))
    os.pwrite(fd, b"there", 5 * PAGE)
    memory = mmap.mmap(fd, len(PATTERN))
    with Pager(memory, PATTERN, window=PAGE) as pager:
        assert memory[5 * PAGE : 5 * PAGE + 5] == b"there"
        assert memory[6 * PAGE : 7 * PAGE] == PATTERN[6 * PAGE : 7 * PAGE]
        assert pager.stats.faults == 1
        os.pwrite(fd, b"later", 8 * PAGE)
    assert memory[8 * PAGE : 8 * PAGE + 5] == b"later"  # came another way: close() let it be
    assert Touch(memory).fails(9)
    os.close(fd)


def test_a_window_is_aligned_and_ends_where_the_memory_or_what_is_missing_does():
    asked = []
    memory = plain(21)

    def give(offset, size):
        asked.append((offset // PAGE, size // PAGE))
        return PATTERN[offset : offset + size]

    touch = Touch(memory)
    with Pager(memory, give, window=8 * PAGE) as pager:
        pager.prefetch(10 * PAGE, PAGE)
        for page in (9, 13, 20, 3):
            touch(page)
    assert asked == [(10, 1), (8, 2), (11, 5), (16, 5), (0, 8)]


def test_many_threads_on_one_page_are_one_question():
    asked, memory, all_wait = [], plain(1), threading.Barrier(9)

    def give(offset, size):
        asked.append(offset)
        all_wait.wait(30)
        return PATTERN[:size]

    touches = [Touch(memory) for _ in range(8)]
    found = []

    def touch(i):
        if i:
            all_wait.wait(30)  # the first has been noticed, and its answer is on the way
        found.append(touches[i](0))

    with Pager(memory, give) as pager:
        threads = [in_thread(lambda i=i: touch(i)) for i in range(8)]
        all_wait.wait(30)
        for thread in threads:
            thread.join()
        assert pager.stats.fetches == 1
    assert asked == [0]
    assert found == [PATTERN[:PAGE]] * 8


# ---- sources that fail ----


def too_little(offset, size):
    return PATTERN[offset : offset + size - 1]


def too_much(offset, size):
    return PATTERN[offset : offset + size] + b"x"


def raises(offset, size):
    raise LookupError("no such page")


def no_bytes(offset, size):
    return "text"


def nothing(offset, size):
    return None


@pytest.mark.parametrize(
    ("give", "why", "cause"),
    [(too_little, "it gave 0xfff of 0x1000 bytes", None), (too_much, "it gave more than the 0x1000 bytes it was asked for", None),
     (raises, "it raised LookupError('no such page')", LookupError), (no_bytes, "it raised TypeError", TypeError),
     (nothing, "it raised TypeError", TypeError)],
)  # fmt: skip
def test_a_callable_that_does_not_give_it(give, why, cause):
    memory, told = plain(), threading.Event()
    seen, bad = [], True

    def once(offset, size):
        return give(offset, size) if bad and offset <= 20 * PAGE < offset + size else PATTERN[offset : offset + size]

    def on_error(error):
        seen.append(error)
        told.set()

    touch = Touch(memory)
    with Pager(memory, once, offset=0, on_error=on_error) as pager:
        assert touch.fails(20)
        assert touch.fails(20)  # and it is not asked again
        (error,) = pager.errors
        assert why in str(error)
        assert (error.gpa, error.size, error.offset) == (20 * PAGE, PAGE, 20 * PAGE)
        assert cause is None or isinstance(error.__cause__, cause)
        assert str(pager.error_at(20 * PAGE + 5)) == str(error)
        assert pager.error_at(21 * PAGE) is None
        assert pager.error_at(-1) is None
        assert told.wait(30)
        assert [str(e) for e in seen] == [str(error)]
        assert pager.stats.errors == 1
        assert touch(21) == PATTERN[21 * PAGE : 22 * PAGE]  # its neighbours are not concerned
        with pytest.raises(PagerError, match=r"it (gave|raised)"):
            pager.fill_all()
        bad = False
        pager.retry()
        assert pager.error_at(20 * PAGE) is None
        assert touch(20) == PATTERN[20 * PAGE : 21 * PAGE]
        pager.fill_all()
    assert memory[:] == PATTERN


def test_what_on_error_raises_does_not_end_the_thread(monkeypatch):
    memory, seen = plain(), []
    touch = Touch(memory)
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(unraisable.exc_type))

    def on_error(error):
        raise LookupError

    with Pager(memory, lambda offset, size: PATTERN[offset : offset + size] if offset else b"", window=PAGE,
               on_error=on_error) as pager:  # fmt: skip
        assert touch.fails(0)
        assert touch(1) == PATTERN[PAGE : 2 * PAGE]
        assert len(pager.errors) == 1
    assert seen == [LookupError]


def test_a_prefetch_that_fails_leaves_it_missing():
    memory, bad = plain(), True
    touch = Touch(memory)
    with Pager(memory, lambda offset, size: b"" if bad else PATTERN[offset : offset + size], window=PAGE) as pager:
        with pytest.raises(PagerError, match="it gave 0x0 of 0x1000 bytes") as caught:
            pager.fill_all()
        assert caught.value.gpa == 0
        assert not pager.errors
        assert pager.stats.missing == PAGES
        bad = False
        assert touch(0) == PATTERN[:PAGE]


def test_a_file_that_was_truncated(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(PATTERN)
    memory = plain()
    touch = Touch(memory)
    with Pager(memory, path) as pager:
        os.truncate(path, 10 * PAGE + 5)
        assert touch(3) == PATTERN[3 * PAGE : 4 * PAGE]  # its window ends beyond, it does not
        assert touch.fails(10)
        assert touch.fails(200)
        assert [str(e).partition(": ")[2] for e in pager.errors] == [
            "it gave 0x5 of 0x1000 bytes",
            "it gave 0x0 of 0x1000 bytes",
        ]
        path.write_bytes(PATTERN)
        pager.retry(200 * PAGE, PAGE)
        assert touch(200) == PATTERN[200 * PAGE : 201 * PAGE]
        assert touch.fails(10)


def test_source_memory_that_cannot_be_read():
    fd = os.memfd_create("source")
    os.ftruncate(fd, len(PATTERN))
    there = mmap.mmap(fd, len(PATTERN))
    os.ftruncate(fd, PAGE)
    memory = plain()
    with Pager(memory, there, window=PAGE) as pager:
        assert Touch(memory)(0) == bytes(PAGE)
        assert Touch(memory).fails(1)
        assert pager.errors[0].errno == errno.EFAULT
        assert isinstance(pager.errors[0].__cause__, OSError)
    os.close(fd)


@pytest.mark.parametrize(
    ("how", "why"),
    [("closes", "the other side closed it"), ("shuts", "it gave 0x10 of 0x1000 bytes"), ("extra", "it gave more than")],
)
def test_a_stream_that_fails_is_not_asked_again(how, why):
    ours, theirs = socket.socketpair()
    memory = plain()
    touch = Touch(memory)

    def other_side():
        serve(theirs.fileno(), theirs.fileno(), PATTERN, 2, b"x" if how == "extra" else b"")
        if how == "shuts":
            theirs.send(b"y" * 16)
        if how != "extra":
            theirs.shutdown(socket.SHUT_RDWR)

    thread = in_thread(other_side)
    with ours, Pager(memory, ours, window=PAGE) as pager:
        assert touch(7) == PATTERN[7 * PAGE : 8 * PAGE]
        if how != "extra":
            assert touch(8) == PATTERN[8 * PAGE : 9 * PAGE]
        assert touch.fails(9)
        assert touch.fails(10)
        assert why in str(pager.errors[0])
        assert len(pager.errors) == 2
        assert touch(7) == PATTERN[7 * PAGE : 8 * PAGE]
        with pytest.raises(PagerError):
            pager.fill_all()
    thread.join()  # it sees the end
    theirs.close()


# ---- ends ----


@pytest.mark.parametrize("kind", ["socket", "callable"])
def test_close_with_a_source_that_blocks(kind, monkeypatch):
    monkeypatch.setattr(faults._pager, "_PATIENCE", 0.01)
    asked, go_on = threading.Event(), threading.Event()
    ours, theirs = socket.socketpair()
    memory = plain()
    touch, outcome = Touch(memory), []

    def give(offset, size):
        asked.set()
        go_on.wait(60)
        return b"late" * (size // 4)

    with ours, theirs:
        pager = Pager(memory, ours if kind == "socket" else give)
        thread = in_thread(lambda: outcome.append(touch.fails(5)))
        if kind == "socket":
            assert len(theirs.recv(16)) == 16
        else:
            assert asked.wait(30)
        pager.close()
        thread.join()
        assert outcome == [True]
        go_on.set()
        pager._thread.join()
        assert touch.fails(5)  # what it gave later is not filled in
        assert (pager.stats.fetches, pager.stats.pages, pager.errors) == (0, 0, [])
        pager.close()
        for call in (pager.fill_all, pager.retry):
            with pytest.raises(Error, match="closed"):
                call()


def test_close_from_the_source_and_prefetch_from_it():
    memory, seen = plain(), []

    def give(offset, size):
        try:
            pager.fill_all()
        except Error as error:
            seen.append(str(error))
        pager.close()
        return PATTERN[offset : offset + size]

    pager = Pager(memory, give)
    assert Touch(memory).fails(0)
    pager._thread.join()
    assert seen == ["prefetch() in the Pager's own thread would wait for itself"]


def test_what_is_missing_at_the_end_is_inaccessible():
    memory = plain()
    memory[0] = 1
    touch = Touch(memory)
    with Pager(memory, PATTERN, window=PAGE):
        for page in range(10, PAGES, 3):
            touch(page)
    assert memory[:PAGE] == b"\1" + bytes(PAGE - 1)
    for page in range(1, PAGES):
        if page >= 10 and page % 3 == 1:
            assert touch(page) == PATTERN[page * PAGE : (page + 1) * PAGE]
        else:
            assert touch.fails(page)


def test_discarded_pages_are_zeros():
    memory = plain()
    touch = Touch(memory)
    with Pager(memory, PATTERN) as pager:
        assert touch(2) == PATTERN[2 * PAGE : 3 * PAGE]
        memory.madvise(mmap.MADV_DONTNEED, 2 * PAGE, PAGE)
        assert touch(2) == bytes(PAGE)
        assert touch(3) == PATTERN[3 * PAGE : 4 * PAGE]
        assert pager.stats.faults == 2


def test_dropped_without_close():
    memory = plain()
    before, threads = leaks(), threading.active_count()
    for _ in range(5):
        pager = Pager(memory, PATTERN)
        Touch(memory)(5)
        thread, gone = pager._thread, weakref.ref(pager)
        del pager
        gc.collect()
        assert gone() is None
        thread.join(30)
        assert not thread.is_alive()
        memory = plain()
    del thread
    assert leaks()[0] == before[0]
    assert threading.active_count() == threads


EXIT = """
import contextlib, mmap, os, threading
from kvmexit.faults import Pager
memory = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
asked = threading.Event()
def give(offset, size):
    asked.set()
    threading.Event().wait()
pager = Pager(memory, {source}, window=4096)
def touch():
    with contextlib.suppress(OSError):
        os.write(os.memfd_create("x"), memory)
threading.Thread(target=touch, daemon=True).start()
asked.wait() if {source} is give else None
print("ends")
"""


@pytest.mark.parametrize("source", ["give", "bytes(1 << 20)"])
def test_the_interpreter_exits_with_one_alive(source):
    done = python(EXIT.format(source=source))
    assert (done.returncode, done.stdout, done.stderr) == (0, "ends\n", "")


def test_fork():
    memory = plain()
    touch = Touch(memory)
    with Pager(memory, PATTERN) as pager:
        touch(0)
        child = os.fork()
        if not child:
            status = 1
            with contextlib.suppress(BaseException):
                try:
                    pager.fill_all()
                except Error as error:
                    status = 0 if "parent" in str(error) else 2
                pager.close()
                del pager
                gc.collect()
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert touch(100) == PATTERN[100 * PAGE : 101 * PAGE]
        pager.fill_all()
    assert memory[:] == PATTERN


def test_ctrl_c_ends_a_prefetch():
    memory, go_on = plain(), threading.Event()

    def give(offset, size):
        if offset == 0:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            go_on.wait(30)
        return PATTERN[offset : offset + size]

    with Pager(memory, give) as pager:
        with pytest.raises(KeyboardInterrupt):
            pager.fill_all()
        go_on.set()
        pager.fill_all()
    assert memory[:] == PATTERN


# ---- arguments ----


@pytest.mark.parametrize(
    ("source", "options", "error", "text"),
    [
        (PATTERN, {"window": 5000}, ValueError, "power of two"), (PATTERN, {"window": 4 << 20}, ValueError, "power of two"),
        (PATTERN, {"window": 2048}, ValueError, "power of two"), (PATTERN, {"offset": -1}, ValueError, "offset"),
        (PATTERN, {"offset": 1 << 63}, ValueError, "offset"), (PATTERN, {"offset": 1}, ValueError, "too short"),
        (PATTERN[:-1], {}, ValueError, "source of 0xfffff bytes is too short"), ("/nonexistent", {}, FileNotFoundError, "nonexistent"),
        (os.devnull, {}, ValueError, "no file, block device or socket"), (99999, {}, OSError, "Bad file descriptor"),
        ((0, 99999), {}, OSError, "Bad file descriptor"), ((0,), {}, TypeError, "a pair"), (1.5, {}, TypeError, "give a callable"),
        (PATTERN, {"on_error": 1}, TypeError, "on_error"),
    ],
)  # fmt: skip
def test_bad_arguments(source, options, error, text):
    before = leaks()[0]
    with pytest.raises(error, match=text):
        Pager(plain(), source, **options)
    assert leaks()[0] == before


def test_bad_memory(scripted, tmp_path):
    with pytest.raises(ValueError, match="whole pages"):
        Pager(bytearray(100), PATTERN)
    slot = scripted.memory.add(0, PAGE, guest_memfd=True)
    with pytest.raises(ValueError, match="has a guest_memfd"):
        Pager(slot, PATTERN)
    path = tmp_path / "file"
    path.write_bytes(PATTERN)
    memory = plain()
    with Pager(memory, PATTERN), pytest.raises(KvmError, match="another userfaultfd has this memory") as caught:
        Pager(memory, PATTERN)
    assert caught.value.call == "UFFDIO_REGISTER"


@pytest.mark.parametrize("call", [lambda p: p.prefetch(1, PAGE), lambda p: p.prefetch(0, 0), lambda p: p.prefetch(0, len(PATTERN) + PAGE),
                                  lambda p: p.prefetch(-PAGE, PAGE), lambda p: p.retry(0), lambda p: p.retry(PAGE, 1)])  # fmt: skip
def test_bad_ranges(call):
    with Pager(plain(), PATTERN) as pager, pytest.raises(ValueError, match="gpa"):
        call(pager)


UNPRIVILEGED = """
import mmap, os
from kvmexit import KvmError
from kvmexit.faults import Pager
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    Pager(mmap.mmap(-1, 4096), bytes(4096))
except KvmError as error:
    print(error.call, error)
"""


def test_what_is_missing_where_it_is_not_permitted():
    if os.geteuid():
        pytest.skip("needs root to become somebody else")
    with open("/proc/sys/vm/unprivileged_userfaultfd") as file:
        if file.read().strip() != "0" or os.stat("/dev/userfaultfd").st_mode & 0o006:
            pytest.skip("everybody has userfaultfd on this machine")
    done = python(UNPRIVILEGED)
    for text in ("userfaultfd: Operation not permitted", "CAP_SYS_PTRACE", "vm.unprivileged_userfaultfd=1, which is 0",
                 "/dev/userfaultfd, which gives 'Permission denied'"):  # fmt: skip
        assert text in done.stdout, done


# ---- guests ----


def aim(vcpu, pages=PAGES, stride=PAGE, start=0):
    """Have a vCPU add up the first words of that many pages at DATA, or of what `stride` says."""
    vcpu.regs.rip, vcpu.regs.rax, vcpu.regs.rbx = CODE, 0, DATA
    vcpu.regs.rcx, vcpu.regs.rdx, vcpu.regs.rsi, vcpu.regs.rdi = pages, stride, start, len(PATTERN) - 1


def words(data=PATTERN, stride=PAGE):
    return sum(int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), stride)) & (1 << 64) - 1


@pytest.mark.parametrize("stride", [8, PAGE, 37 * PAGE])
@pytest.mark.parametrize("kind", ["bytes", "callable", "path", "socket"])
def test_a_guest_walks(vm, kind, stride, tmp_path):
    vcpu = load(vm, WALK)
    slot = vm.memory.add(DATA, len(PATTERN))
    aim(vcpu, len(PATTERN) // 8 if stride == 8 else PAGES, stride)
    with source(kind, PATTERN, tmp_path) as given, Pager(slot, given, window=16 << 10) as pager:
        assert isinstance(vcpu.run(timeout=60), kvmexit.Io)
        assert vcpu.regs.rax == words(stride=8 if stride == 8 else PAGE)
        assert pager.stats.pages == PAGES
    assert vm.memory.read(DATA, len(PATTERN)) == PATTERN


@pytest.mark.parametrize("irqchip", [False, True])
def test_a_vcpu_that_waits_for_a_page_can_be_kicked(vm, irqchip):
    if irqchip:
        vm.create_irqchip()
    vcpu = load(vm, WALK)
    slot = vm.memory.add(DATA, len(PATTERN))
    aim(vcpu)
    asked, go_on = threading.Event(), threading.Event()

    def give(offset, size):
        asked.set()
        go_on.wait(60)
        return PATTERN[offset : offset + size]

    with Pager(slot, give) as pager:
        assert vcpu.run(timeout=0.05).cause == "timeout"
        assert asked.wait(30)
        kicker = in_thread(vcpu.kick)
        assert vcpu.run(timeout=60).cause == "kick"
        kicker.join()
        assert pager.stats.pages == 0
        go_on.set()
        assert isinstance(vcpu.run(timeout=60), kvmexit.Io)
        assert vcpu.regs.rax == words()


def test_an_error_is_an_unexplained_fault_and_can_be_repaired(vm):
    vcpu = load(vm, WALK)
    slot = vm.memory.add(DATA, len(PATTERN))
    aim(vcpu)
    bad = {20, 21, 200}
    repaired = []

    def give(offset, size):
        if bad & set(range(offset // PAGE, (offset + size) // PAGE)):
            raise LookupError(offset)
        return PATTERN[offset : offset + size]

    @vm.on(kvmexit.UnexplainedFault)
    def repair(vcpu, fault):
        error = pager.errors[-1]
        if error.gpa == DATA + 200 * PAGE:
            return kvmexit.PASS
        bad.remove((error.gpa - DATA) // PAGE)
        repaired.append(error.gpa)
        pager.retry(error.gpa, PAGE)

    with Pager(slot, give) as pager:
        assert isinstance(vcpu.run(timeout=60), kvmexit.UnexplainedFault)
        assert repaired == [DATA + 20 * PAGE, DATA + 21 * PAGE]
        if importlib.util.find_spec("iced_x86"):
            why = faults.explain(vcpu)
            assert why.cause is faults.Cause.PROT_NONE
            assert why.gpa == DATA + 200 * PAGE
        assert isinstance(pager.error_at(DATA + 200 * PAGE).__cause__, LookupError)
        bad.clear()
        pager.retry()
        assert isinstance(vcpu.run(timeout=60), kvmexit.Io)
        assert vcpu.regs.rax == words()


def test_after_close_a_guest_gets_no_zeros_and_goes_on(vm):
    vcpu = load(vm, WALK)
    slot = vm.memory.add(DATA, len(PATTERN))
    aim(vcpu)
    with Pager(slot, PATTERN, window=PAGE) as pager:
        pager.prefetch(DATA, 10 * PAGE)
    assert isinstance(vcpu.run(timeout=60), kvmexit.UnexplainedFault)
    assert vcpu.regs.rsi == 10 * PAGE
    with pytest.raises(KvmError, match="cannot be reached"):
        vm.memory.read(DATA + 10 * PAGE, 1)
    aim(vcpu, 10)
    assert isinstance(vcpu.run(timeout=60), kvmexit.Io)


def test_a_slot_removed_and_a_vm_closed_under_it(kvm):
    for close in (False, True):
        vm = kvmexit.VM()
        vcpu = load(vm, WALK)
        slot = vm.memory.add(DATA, len(PATTERN))
        aim(vcpu)
        with Pager(slot, PATTERN, window=PAGE) as pager:
            pager.prefetch(DATA, PAGE)
            if close:
                vm.close()
            else:
                vm.memory.remove(slot)
                assert isinstance(vcpu.run(timeout=60), kvmexit.Mmio)
            pager.fill_all()
            assert pager.stats.missing == 0
        vm.close()


@pytest.mark.parametrize("kind", ["bytes", "socket", "callable"])
def test_stress(kvm, kind, tmp_path):
    """Two vCPUs, each in its own order, while a prefetch runs, kicks come and pages are read from outside."""
    for round_ in range(stress(12)):
        with kvmexit.VM() as vm, source(kind, PATTERN, tmp_path) as given:
            one_round(vm, given, random.Random(round_))


def one_round(vm, given, rng):
    ram = vm.memory.add(0, 1 << 20)
    ram[CODE : CODE + len(WALK)] = WALK
    slot = vm.memory.add(DATA, len(PATTERN))
    vcpus = [vm.create_vcpu(i) for i in range(2)]
    sums, done = {}, threading.Event()
    for vcpu in vcpus:
        kvmexit.x86.long_mode(vcpu, CODE, cpl=3)
        aim(vcpu, PAGES, PAGE * rng.randrange(1, PAGES, 2), PAGE * rng.randrange(PAGES))

    def run(vcpu):
        while not isinstance(exit := vcpu.run(timeout=60), kvmexit.Io):
            assert exit.cause == "kick", exit
        sums[vcpu] = vcpu.regs.rax

    def kick():
        while not done.wait(0.001):
            for vcpu in vcpus:
                vcpu.kick()

    with Pager(slot, given, window=PAGE << rng.randrange(5)) as pager:
        threads = [in_thread(lambda vcpu=vcpu: run(vcpu)) for vcpu in vcpus]
        kicker = in_thread(kick)
        pager.prefetch(DATA, len(PATTERN) // 2)
        at = DATA + rng.randrange(len(PATTERN))
        assert vm.memory.read(at, 1) == PATTERN[at - DATA : at - DATA + 1]
        for thread in threads:
            thread.join(100)
        done.set()
        kicker.join()
        assert pager.stats.missing == 0
        assert pager.stats.pages == PAGES
    assert list(sums.values()) == [words()] * 2
    assert vm.memory.read(DATA, len(PATTERN)) == PATTERN
