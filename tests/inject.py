"""Every system call that an operation makes, failed in turn with each errno: what is left must be as it was.

    python tests/inject.py             prints the table of what was tried; tests/test_inject.py runs it
    python tests/inject.py --private   that of private memory, on a kernel that has it: lab/run, and more than ten minutes there

On the real /dev/kvm, with tests/inject.c preloaded (it sees to that itself). For each operation and kind of call: the first
call fails, then, all made anew, the second, ... until the operation makes no more of them.

What must hold after each: nothing but kvmexit's errors, OSError or MemoryError is raised; the VM runs a guest and takes new
memory, or the operation was the VM's own making; once all is closed no descriptor or mapping is left; the shadow says what
KVM was told last.
"""

import ctypes
import errno
import gc
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
CALLS = ["ioctl", "mmap", "munmap", "madvise", "fallocate", "eventfd", "timer_create", "close", "open", "fcntl", "memfd_create",
         "ftruncate", "process_vm_readv"]  # fmt: skip
ERRNOS = {
    "ioctl": ["ENOMEM", "EINVAL", "EINTR", "EAGAIN", "EBUSY", "EIO", "EPERM", "ENOSPC", "EFAULT", "EMFILE"],
    "mmap": ["ENOMEM", "EACCES", "EINVAL"], "munmap": ["EINVAL"], "madvise": ["ENOMEM", "EAGAIN", "EINTR"],
    "fallocate": ["ENOSPC", "EINTR", "EIO"], "eventfd": ["EMFILE", "ENOMEM"], "timer_create": ["EAGAIN", "ENOMEM"],
    "close": ["EINTR", "EIO"], "open": ["EMFILE", "ENOENT", "EINTR"], "fcntl": ["EMFILE", "EINVAL"],
    "memfd_create": ["EMFILE", "ENOMEM"], "ftruncate": ["ENOSPC", "EINTR"], "process_vm_readv": ["EFAULT", "ENOMEM"],
}  # fmt: skip
PAGE = 4096
HLT = bytes.fromhex("f4")
# next: mov al, [rdi]; out 0x81, al; add rdi, 0x1000; dec ecx; jnz next; hlt
PEEK = bytes.fromhex("8a 07  e6 81  48 81 c7 00 10 00 00  ff c9  75 f1  f4")
REGION = 0x1000_0000
MOST = 300  # calls of one kind in one operation


# ---- the parent ----


def run(library, cases, errnos=99):
    """Do these in a process that has the library preloaded, with the first so many errnos of each call; -> {"tried": [[operation,
    call, which one, errno, outcome]], "broken": [what does not hold]}."""
    preloaded = " ".join([*os.environ.get("LD_PRELOAD", "").split(), str(library)])
    env = {**os.environ, "LD_PRELOAD": preloaded, "PYTHONMALLOC": "malloc", "PYTHONPATH": os.pathsep.join(sys.path)}
    names = [case.__name__ for case in cases]
    done = subprocess.run([sys.executable, __file__, "--here", str(library), str(errnos), *names], env=env, capture_output=True, text=True,
                          timeout=900, check=False)  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"tests/inject.py ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def table(tried):
    """-> lines: of each operation and call how many it makes, what was tried and what came of it."""
    lines = [f"{'operation':<26} {'call':<18} {'calls':>5} {'tried':>6}  outcomes"]
    for operation, call in dict.fromkeys((one[0], one[1]) for one in tried):
        ours = [one for one in tried if one[:2] == [operation, call]]
        outcomes = ", ".join(f"{what} {count}" for what, count in Counter(one[4] for one in ours).most_common())
        lines.append(f"{operation:<26} {call:<18} {max(one[2] for one in ours):>5} {len(ours):>6}  {outcomes}")
    return [*lines, f"in all {len(tried)} failures injected"]


# ---- the child ----


def leaks():
    """What a process holds: descriptors, and mappings of files, of KVM and of this size of ours."""
    gc.collect()
    with open("/proc/self/maps") as maps:
        mapped = Counter(line.split()[-1] for line in maps if len(line.split()) > 5 and not line.split()[-1].startswith("["))
    with open("/proc/self/maps") as maps:
        for line in maps:
            first, end = (int(part, 16) for part in line.split()[0].split("-"))
            mapped["our anonymous"] += len(line.split()) == 5 and end - first in OUR_SIZES
    return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                  if os.path.exists(f"/proc/self/fd/{fd}")), sorted(mapped.items())  # fmt: skip


OUR_SIZES = {size * PAGE for size in (19, 23)}  # of slots: no allocator asks for these


class Case:
    """An operation: prepare() without failures, do() with one, check() what must hold afterwards, then all is closed."""

    attributes = None

    def prepare(self, kvmexit):
        self.k = kvmexit
        self.vm = kvmexit.VM(attributes=self.attributes() if self.attributes else None)
        ram = self.vm.memory.add(0, 1 << 20)
        ram[0x1000:0x1001] = HLT
        self.vcpu = self.vm.create_vcpu(0)
        kvmexit.x86.real_mode(self.vcpu, 0x1000)

    def do(self):
        raise NotImplementedError

    def check(self, failed):
        """The VM goes on."""
        if self.vm.closed:
            return
        self.k.x86.real_mode(self.vcpu, 0x1000)  # registers that KVM refused are forgotten
        for _ in range(3):
            exit = self.vcpu.run(timeout=5)
            if not isinstance(exit, self.k.Interrupted):
                break
        assert isinstance(exit, self.k.Hlt), f"the guest does not run: {exit!r}"
        slot = self.vm.memory.add(0x4000_0000, PAGE)
        self.vm.memory.remove(slot)

    def finish(self):
        self.vm.close()


class MakeVM(Case):
    def prepare(self, kvmexit):
        self.k, self.vm = kvmexit, None

    def do(self):
        self.vm = self.k.VM()

    def check(self, failed):
        assert failed or self.vm is not None

    def finish(self):
        if self.vm is not None:
            self.vm.close()


class CreateVcpu(Case):
    def do(self):
        self.other = self.vm.create_vcpu(1)


class Add(Case):
    def do(self):
        self.vm.memory.add(0x10_0000, 19 * PAGE)

    def check(self, failed):
        assert len(self.vm.memory.slots) == (1 if failed else 2), self.vm.memory.slots
        assert self.vm.memory.ranges()[-1].gpa + self.vm.memory.ranges()[-1].size == 0x10_0000 + (0 if failed else 19 * PAGE)
        if failed:
            self.vm.memory.add(0x10_0000, 19 * PAGE)  # asking again does it
        super().check(failed)


class AddFile(Add):
    def prepare(self, kvmexit):
        super().prepare(kvmexit)
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.file.truncate(19 * PAGE)

    def do(self):
        self.vm.memory.add(0x10_0000, 19 * PAGE, fd=self.file.fileno())

    def finish(self):
        super().finish()
        self.file.close()


class AddLogged(Add):
    def do(self):
        self.vm.memory.add(0x10_0000, 19 * PAGE, log_dirty=True)


class Remove(Case):
    def prepare(self, kvmexit):
        super().prepare(kvmexit)
        self.slot = self.vm.memory.add(0x10_0000, 19 * PAGE)

    def do(self):
        self.vm.memory.remove(self.slot)
        self.slot = None

    def check(self, failed):
        assert len(self.vm.memory.slots) == 1 + bool(failed), self.vm.memory.slots
        if failed:
            self.slot[0:1] = b"x"
            self.vm.memory.remove(self.slot)
        super().check(failed)


class Rebinding(Case):
    """Memory that becomes private by rebinding slots: on any kernel."""

    def attributes(self):
        from kvmexit import SlotRebind

        return SlotRebind()


class RebindAdd(Rebinding, Add):
    def do(self):
        self.vm.memory.add(0x10_0000, 19 * PAGE, guest_memfd=True)


class RebindConvert(Rebinding):
    private = True

    def prepare(self, kvmexit):
        super().prepare(kvmexit)
        self.slot = self.vm.memory.add(0x10_0000, 23 * PAGE, guest_memfd=True)
        self.vm.memory.convert(0x10_2000, 7 * PAGE, private=True)
        if not self.private:
            self.vm.memory.convert(0x10_5000, 9 * PAGE, private=True)
        self.before = self.vm.memory.ranges()

    def do(self):
        if self.private:
            self.vm.memory.convert(0x10_1000, 12 * PAGE, private=True)
        else:
            self.vm.memory.convert(0x10_0000, 5 * PAGE, private=False)

    def check(self, failed):
        if failed and not isinstance(failed, self.k.ConversionError):
            assert self.vm.memory.ranges() == self.before, "it failed, and the shadow changed"
        elif failed:
            done = failed.done
            first = 0x10_1000 if self.private else 0x10_0000
            assert all(self.vm.memory.is_private(gpa) == self.private for gpa in range(first, first + done, PAGE)), failed
        # Each run of one state is one memslot of KVM's; that they are there shows where a guest reads them all.
        self.vm.memory.convert(0x10_0000, 23 * PAGE, private=False)
        self.slot[:] = bytes([0x5A]) * len(self.slot)
        self.vm.memory.convert(0x10_0000, 23 * PAGE, private=True)
        super().check(failed)
        assert [run.private for run in self.vm.memory.ranges()] == [False, True]


class RebindShare(RebindConvert):
    private = False


class RebindRemove(Rebinding, Remove):
    def prepare(self, kvmexit):
        Case.prepare(self, kvmexit)
        self.slot = self.vm.memory.add(0x10_0000, 19 * PAGE, guest_memfd=True)
        self.vm.memory.convert(0x10_1000, 2 * PAGE, private=True)


class Private(Case):
    """On a kernel that has private memory: KVM's own attributes and guest_memfd."""

    private = True

    def prepare(self, kvmexit):
        self.k = kvmexit
        self.vm, self.ring = kvmexit.VM(kvmexit.VMType.SW_PROTECTED), kvmexit.native.Ring(64)
        self.vm.on_pio(0x81, 1, self.ring)
        ram = self.vm.memory.add(0, 1 << 20)
        ram[0x1000:0x1001] = HLT
        ram[0x2000 : 0x2000 + len(PEEK)] = PEEK
        self.vcpu = self.vm.create_vcpu(0)
        kvmexit.x86.real_mode(self.vcpu, 0x1000)
        self.slots = [self.vm.memory.add(REGION, 19 * PAGE, guest_memfd=True), self.vm.memory.add(REGION + 19 * PAGE, 23 * PAGE, guest_memfd=True)]
        self.vm.memory.convert(REGION + 4 * PAGE, PAGE, private=True)
        if not self.private:
            self.vm.memory.convert(REGION + 9 * PAGE, 30 * PAGE, private=True)

    def found_shared(self):
        """-> by address whether the guest finds a page shared: it sees what the host has written, or not. KVM's attributes cannot
        be read."""
        shared = {}
        for slot in self.slots:
            for offset in range(0, len(slot), PAGE):
                slot[offset : offset + 1] = b"\x5a"
            self.k.x86.long_mode(self.vcpu, 0x2000, cpl=0, tables=0x80000)
            self.vcpu.regs.rdi, self.vcpu.regs.rcx = slot.gpa, len(slot) // PAGE
            exit = self.vcpu.run(timeout=5)
            assert isinstance(exit, self.k.Hlt), exit
            shared.update({slot.gpa + i * PAGE: entry.data == 0x5A for i, entry in enumerate(self.ring.drain())})
        return shared

    def check(self, failed):
        if self.vm.closed:
            return
        for gpa, shared in self.found_shared().items():
            assert shared != self.vm.memory.is_private(gpa), f"shadow and KVM differ at {gpa:#x}: {failed!r}"
        super().check(failed)


class PrivateAdd(Private):
    def do(self):
        self.slots.append(self.vm.memory.add(1 << 30, 19 * PAGE, guest_memfd=True))

    def check(self, failed):
        if failed:
            self.do()  # asking again does it
        self.vm.memory.convert(1 << 30, 19 * PAGE, private=True)
        self.vm.memory.remove(self.slots.pop())
        super().check(failed)


class PrivateConvert(Private):
    def do(self):
        self.vm.memory.convert(REGION + PAGE, 40 * PAGE, private=True)

    def check(self, failed):
        if isinstance(failed, self.k.ConversionError):
            done = range(failed.gpa, failed.gpa + failed.done, PAGE)
            assert all(self.vm.memory.is_private(gpa) == self.private for gpa in done), failed
        super().check(failed)
        self.do()  # asking again does it
        assert all(self.vm.memory.is_private(REGION + i * PAGE) == self.private for i in range(1, 41))
        super().check(failed)


class PrivateShare(PrivateConvert):
    private = False

    def do(self):
        self.vm.memory.convert(REGION + PAGE, 40 * PAGE, private=False)


class PrivateRemove(Private):
    private = False

    def do(self):
        self.vm.memory.remove(self.slots[1])
        self.slots.pop()

    def check(self, failed):
        assert len(self.vm.memory.slots) == 2 + bool(failed), self.vm.memory.slots
        super().check(failed)
        if failed:
            self.do()


class PrivateCloseMemfd(Private):
    def do(self):
        self.slots[0].close_guest_memfd()

    def check(self, failed):
        self.vm.memory.convert(REGION + 4 * PAGE, PAGE, private=False)  # what is private there faults for ever
        super().check(failed)


class Discard(Case):
    """A scripted VM's, whose backend takes everything: what fails is giving memory back."""

    def prepare(self, kvmexit):
        from kvmexit.testing import RecordedAttributes, ScriptedVM

        self.k, self.backend = kvmexit, RecordedAttributes()
        self.vm = ScriptedVM(attributes=self.backend)
        self.vm.memory.add(0, 19 * PAGE, guest_memfd=True)
        self.vm.memory.add(19 * PAGE, 23 * PAGE, guest_memfd=True)
        self.vm.memory.convert(4 * PAGE, PAGE, private=True)

    def do(self):
        self.vm.memory.convert(0, 42 * PAGE, private=True)
        self.vm.memory.convert(PAGE, 40 * PAGE, private=False)

    def check(self, failed):
        held = self.backend.private
        for gpa in range(0, 42 * PAGE, PAGE):
            assert self.vm.memory.is_private(gpa) == (gpa in held), f"shadow and backend differ at {gpa:#x}: {failed!r}"
        self.vm.memory.convert(0, 42 * PAGE, private=True)
        assert len(self.backend.private) == 42


class ScriptedAdd(Discard):
    def do(self):
        self.vm.memory.add(1 << 30, 19 * PAGE, guest_memfd=True)

    def check(self, failed):
        assert len(self.vm.memory.slots) == (2 if failed else 3)
        super().check(failed)


class Run(Case):
    def do(self):
        assert not isinstance(self.vcpu.run(timeout=5), self.k.Interrupted)


class Registers(Case):
    def do(self):
        self.vcpu.regs.rax = 1
        _ = self.vcpu.sregs.cr0
        self.vcpu.sregs.cr3 = 0
        self.vcpu.run(timeout=5)


class EventFds(Case):
    def do(self):
        fd = os.eventfd(0)
        try:
            with self.vm.ioeventfd(0x5000_0000, 4, fd):
                pass
        finally:
            os.close(fd)


class PostedWrites(Case):
    def do(self):
        from kvmexit import native

        with self.vm.coalesce_mmio(0x5000_0000, 0x1000, native.Ring(16)):
            pass


class Read(Case):
    def do(self):
        self.vm.memory.read(0, 3 * PAGE)


class Routes(Case):
    def do(self):
        self.vm.on_msr(0x10, handler=lambda vcpu, exit: 0).remove()
        self.vm.filter_msrs([(0x10, 1, False, False)])
        self.vm.filter_msrs()


class Close(Case):
    def do(self):
        self.vm.close()

    def check(self, failed):
        assert self.vm.closed, "close() failed, and left it open"
        for use in (lambda: self.vcpu.run(), lambda: self.vm.memory.add(0, PAGE), lambda: self.vm.create_vcpu(3)):
            try:
                use()
            except self.k.Error as error:
                assert "closed" in str(error), error  # noqa: PT017
            else:
                raise AssertionError("a closed VM works")


CASES = [MakeVM, CreateVcpu, Add, AddFile, AddLogged, Remove, RebindAdd, RebindConvert, RebindShare, RebindRemove, Discard,
         ScriptedAdd, Run, Registers, EventFds, PostedWrites, Read, Routes, Close]  # fmt: skip
PRIVATE_CASES = [PrivateAdd, PrivateConvert, PrivateShare, PrivateRemove, PrivateCloseMemfd]  # want a kernel with private memory


def attempt(kvmexit, library, case, call, name, n):
    """One operation with one failure. -> (whether there was such a call, what came of it, what is wrong or None)."""
    one, failed, wrong = case(), False, None
    library.inject(-1, 0, 0, 0)
    one.prepare(kvmexit)
    gc.collect()
    library.inject(CALLS.index(call), ctypes.c_ulong(0), ctypes.c_long(n), getattr(errno, name))
    try:
        one.do()
    except (kvmexit.Error, OSError, MemoryError) as error:
        failed = error
    except BaseException as error:
        failed, wrong = error, f"raised {error!r}"
    struck, request = library.injected(), library.injected_request()
    library.inject(-1, 0, 0, 0)
    try:
        one.check(failed)
    except BaseException as error:
        wrong = wrong or f"{type(error).__name__}: {error}, after {failed!r}"
    if failed and not struck:
        wrong = wrong or f"failed without a failure: {failed!r}"
    try:
        one.finish()
    except BaseException as error:
        wrong = wrong or f"cannot be closed: {error!r}"
    outcome = type(failed).__name__ if failed else "no error"
    if wrong:
        wrong = f"{case.__name__}: {call} {n} ({request:#x}) {name}: {wrong}"
    one.__dict__.clear()
    if isinstance(failed, BaseException):
        failed.__traceback__ = None
    return bool(struck), outcome, wrong


def child(library, errnos, names):
    import kvmexit

    library = ctypes.CDLL(library)
    library.inject.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_long, ctypes.c_int]
    library.injected.restype, library.injected_request.restype = ctypes.c_long, ctypes.c_ulong
    tried, broken = [], []
    for case in (globals()[name] for name in names):
        attempt(kvmexit, library, case, "ioctl", "EIO", MOST)  # whatever is made once
        for call in CALLS:
            for name in ERRNOS[call][:errnos]:
                for n in range(1, MOST):
                    before = leaks()
                    struck, outcome, wrong = attempt(kvmexit, library, case, call, name, n)
                    after = leaks()
                    if after != before and not wrong:
                        wrong = (f"{case.__name__}: {call} {n} {name}: left behind "
                                 f"{Counter(after[0]) - Counter(before[0])}, {set(after[1]) - set(before[1])}")
                    if wrong:
                        broken.append(wrong)
                    if not struck:
                        break
                    tried.append([case.__name__, call, n, name, outcome])
    print(json.dumps({"tried": tried, "broken": broken}))


def main():
    """See above."""
    if sys.argv[1:2] == ["--here"]:
        return child(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "inject.so"
        compiler = sysconfig.get_config_var("CC").split()[0]
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-fno-builtin", "-o", library, HERE / "inject.c"], check=True)
        found = run(library, PRIVATE_CASES if sys.argv[1:] == ["--private"] else CASES)
    print("\n".join(table(found["tried"])))
    print("\n".join(found["broken"]))
    return bool(found["broken"])


if __name__ == "__main__":
    sys.exit(main())
