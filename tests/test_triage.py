"""What a return of KVM_RUN means: each row of (rc, errno, exit_reason), its expectation written out here."""

import struct

import pytest
from processes import off_main

import kvmexit
from kvmexit.testing import ScriptStep, hlt, memory_fault, pio_in, pio_out

EFAULT, EINTR, EAGAIN, ENOMEM, EINVAL, EHWPOISON = 14, 4, 11, 12, 22, 133
FATAL = {
    "EINVAL": 22, "EIO": 5, "ENOEXEC": 8, "ENOSYS": 38, "EPERM": 1, "EBADF": 9,
    "EBUSY": 16, "ENXIO": 6, "EINPROGRESS": 115,  # in no row: errors all the same
}
LAST_KNOWN = 43      # KVM_EXIT_SNP_REQ_CERTS
MEMORY_FAULT = 39
FAULT = struct.pack("<3Q", 8, 0x5000, 0x1000)  # flags (private), gpa, size
UNWRITTEN = ScriptStep(reason=None)
IN_A_ROW = 1000      # returns that say nothing, before run() gives up

stale = pytest.mark.parametrize("reason", [None, 0, 2, 10, 39, 0xfffffffd])
fatal = pytest.mark.parametrize("number", FATAL.values(), ids=FATAL)
on_main_or_off = pytest.mark.parametrize("call", ["on the main thread", "on another"], indirect=True)


@pytest.fixture
def call(request):
    """Calls a function on the main thread, which looks for signals after each EINTR, or on another."""
    return off_main if request.param == "on another" else lambda function: function()


# ---- rc 0 ----


@pytest.mark.parametrize("reason", [*range(LAST_KNOWN + 1), LAST_KNOWN + 1, 1000, 0xfffffffd])
def test_success_with_a_reason_is_an_exit_for_that_reason(scripted, reason):
    """0, valid: an ordinary exit; of a reason beyond the known ones, too."""
    assert scripted.create_vcpu(0, [ScriptStep(reason)]).run().reason == reason


def test_an_ordinary_exit_has_no_errno(scripted):
    """0, valid: errno is 0."""
    assert scripted.create_vcpu(0, [hlt()]).run().errno == 0


def test_a_memory_fault_with_success_is_one_without_errno(scripted):
    """0, 39: an exit like any other."""
    fault = scripted.create_vcpu(0, [ScriptStep(MEMORY_FAULT, FAULT)]).run()
    assert (type(fault), fault.gpa, fault.errno) == (kvmexit.MemoryFault, 0x5000, 0)


def test_success_without_a_reason_is_entered_again(scripted):
    """0, the sentinel: the next return counts."""
    assert isinstance(scripted.create_vcpu(0, [UNWRITTEN, hlt()]).run(), kvmexit.Hlt)


def test_success_without_a_reason_is_not_the_exit_before(scripted):
    """0, the sentinel, after an exit whose reason KVM left standing: that exit is not reported twice."""
    vcpu = scripted.create_vcpu(0, [pio_out(1, b"x"), UNWRITTEN, hlt()])
    assert [type(vcpu.run()), type(vcpu.run())] == [kvmexit.Io, kvmexit.Hlt]


def test_re_entries_for_want_of_a_reason_are_counted(scripted):
    """0, the sentinel: vcpu.retries tells how often."""
    vcpu = scripted.create_vcpu(0, [UNWRITTEN, UNWRITTEN, UNWRITTEN, hlt()])
    vcpu.run()
    assert vcpu.retries["unwritten"] == 3


def test_re_entries_for_want_of_a_reason_are_bounded(scripted):
    """0, the sentinel, 1000 times in a row: run() gives up with an Error, which is no KvmError: no call failed."""
    vcpu = scripted.create_vcpu(0, [UNWRITTEN], repeat=10 * IN_A_ROW)
    with pytest.raises(kvmexit.Error) as caught:
        vcpu.run()
    assert (type(caught.value), vcpu.retries["unwritten"]) == (kvmexit.Error, IN_A_ROW)


def test_one_less_than_the_bound_is_borne(scripted):
    """0, the sentinel, 999 times in a row."""
    assert isinstance(scripted.create_vcpu(0, [*[UNWRITTEN] * (IN_A_ROW - 1), hlt()]).run(), kvmexit.Hlt)


def test_an_exit_starts_the_count_of_unwritten_reasons_anew(scripted):
    """0, the sentinel: what counts is how many came in a row."""
    vcpu = scripted.create_vcpu(0, [*[UNWRITTEN] * (IN_A_ROW - 1), pio_out(1, b"x")], repeat=3)
    scripted.on_pio(1, 1, lambda vcpu, io: kvmexit.STOP if vcpu.retries["unwritten"] > 2 * IN_A_ROW else None)
    assert isinstance(vcpu.run(), kvmexit.Io)


def test_a_vcpu_that_gave_up_can_run_again(scripted):
    """0, the sentinel, for too long: the vCPU itself is intact."""
    vcpu = scripted.create_vcpu(0, [*[UNWRITTEN] * IN_A_ROW, hlt()])
    with pytest.raises(kvmexit.Error):
        vcpu.run()
    assert isinstance(vcpu.run(), kvmexit.Hlt)


@pytest.mark.parametrize(("silent", "other"), [
    (UNWRITTEN, ScriptStep(errno=ENOMEM)), (ScriptStep(errno=ENOMEM), UNWRITTEN),
], ids=["unwritten", "ENOMEM"])
def test_the_two_bounds_are_apart(scripted, silent, other):
    """999 of one kind and then one of the other are not 1000 in a row of either."""
    assert isinstance(scripted.create_vcpu(0, [*[silent] * (IN_A_ROW - 1), other, hlt()]).run(), kvmexit.Hlt)


# ---- -1, EFAULT or EHWPOISON ----


@pytest.mark.parametrize("number", [EFAULT, EHWPOISON])
def test_a_memory_fault_keeps_its_errno(scripted, number):
    """EFAULT or EHWPOISON, 39: MemoryFault; the two errnos stay apart."""
    fault = scripted.create_vcpu(0, [memory_fault(0x5000, errno=number)]).run()
    assert (type(fault), fault.errno) == (kvmexit.MemoryFault, number)


def test_a_memory_fault_says_what_kvm_said(scripted):
    """EFAULT, 39: gpa, size and flags are those of the payload."""
    fault = scripted.create_vcpu(0, [ScriptStep(MEMORY_FAULT, FAULT, errno=EFAULT)]).run()
    assert (fault.gpa, fault.size, fault.flags, fault.private) == (0x5000, 0x1000, 8, True)


@pytest.mark.parametrize("number", [EFAULT, EHWPOISON])
@pytest.mark.parametrize("reason", [None, 0, 2, 3, 6, 10, 38, 40, 0xfffffffd])
def test_a_fault_without_reason_39_is_unexplained(scripted, reason, number):
    """EFAULT, not 39: a bare fault, whether the reason is unwritten or another exit's."""
    fault = scripted.create_vcpu(0, [ScriptStep(reason, FAULT, errno=number)]).run()
    assert (type(fault), fault.reason, fault.errno) == (kvmexit.UnexplainedFault, None, number)


def test_an_unexplained_fault_says_where_the_guest_was(scripted):
    """EFAULT, not 39: rip comes from the registers, since KVM gives no address."""
    assert scripted.create_vcpu(0, [ScriptStep(errno=EFAULT, rip=0x7c00)]).run().rip == 0x7c00


def test_an_earlier_memory_fault_does_not_explain_a_bare_one(scripted):
    """EFAULT after a memory fault whose reason and payload still stand in kvm_run: it is bare."""
    vcpu = scripted.create_vcpu(0, [memory_fault(0x5000), ScriptStep(errno=EFAULT)])
    assert [type(vcpu.run()), type(vcpu.run())] == [kvmexit.MemoryFault, kvmexit.UnexplainedFault]


def test_an_earlier_memory_fault_does_not_explain_one_after_a_retry(scripted):
    """EFAULT after EINTR with a stale 39, within one run(): the reason is unwritten before *each* entry."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(MEMORY_FAULT, FAULT, errno=EINTR), ScriptStep(errno=EFAULT)])
    assert isinstance(off_main(vcpu.run), kvmexit.UnexplainedFault)


@pytest.mark.parametrize("fault", [memory_fault(0x5000), ScriptStep(errno=EFAULT)], ids=["explained", "bare"])
def test_a_repaired_fault_is_entered_again(scripted, fault):
    """EFAULT: the vCPU is intact, and goes on once a handler has repaired the page."""
    scripted.on(kvmexit.MemoryFault, lambda vcpu, fault: None)
    scripted.on(kvmexit.UnexplainedFault, lambda vcpu, fault: None)
    assert isinstance(scripted.create_vcpu(0, [fault, hlt()]).run(), kvmexit.Hlt)


# ---- -1, EINTR and EAGAIN ----


@stale
@on_main_or_off
def test_an_interruption_nobody_asked_for_is_entered_again(scripted, reason, call):
    """EINTR, stale: no exit, whatever exit_reason says."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(reason, FAULT, errno=EINTR), hlt()])
    assert isinstance(call(vcpu.run), kvmexit.Hlt)


@on_main_or_off
def test_interruptions_nobody_asked_for_are_counted(scripted, call):
    """EINTR: vcpu.retries tells how often."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(errno=EINTR)] * 3 + [hlt()])
    call(vcpu.run)
    assert vcpu.retries["eintr"] >= 3  # on the main thread a tick may come on top


@stale
def test_eagain_is_entered_again(scripted, reason):
    """EAGAIN, stale: no exit, whatever exit_reason says."""
    assert isinstance(scripted.create_vcpu(0, [ScriptStep(reason, FAULT, errno=EAGAIN), hlt()]).run(), kvmexit.Hlt)


def test_eagain_is_counted(scripted):
    """EAGAIN: vcpu.retries tells how often."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(errno=EAGAIN)] * 3 + [hlt()])
    vcpu.run()
    assert vcpu.retries["eagain"] == 3


@pytest.mark.parametrize("number", [EINTR, EAGAIN])
def test_interruptions_and_eagain_are_never_too_many(scripted, number):
    """EINTR, EAGAIN: re-entered without a bound; a processor may wait long for its start-up."""
    vcpu = scripted.create_vcpu(0, [*[ScriptStep(errno=number)] * 3 * IN_A_ROW, hlt()])
    assert isinstance(off_main(vcpu.run), kvmexit.Hlt)


# ---- -1, ENOMEM ----


@stale
def test_a_passing_enomem_is_entered_again(scripted, reason):
    """ENOMEM, stale: it has been seen to pass."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(reason, FAULT, errno=ENOMEM)] * 5 + [hlt()])
    assert isinstance(vcpu.run(), kvmexit.Hlt)


def test_enomem_is_counted(scripted):
    """ENOMEM: vcpu.retries tells how often."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(errno=ENOMEM)] * 5 + [hlt()])
    vcpu.run()
    assert vcpu.retries["enomem"] == 5


def test_a_lasting_enomem_is_an_error(scripted):
    """ENOMEM, 1000 times in a row: KvmError with that errno."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(errno=ENOMEM)], repeat=10 * IN_A_ROW)
    with pytest.raises(kvmexit.KvmError) as caught:
        vcpu.run()
    assert (caught.value.errno, caught.value.call, vcpu.retries["enomem"]) == (ENOMEM, "KVM_RUN", IN_A_ROW)


@pytest.mark.parametrize("step", [ScriptStep(errno=ENOMEM), UNWRITTEN], ids=["ENOMEM", "no reason"])
def test_an_interruption_does_not_begin_a_row_anew(scripted, step):
    """EINTR, which the main thread's tick brings ten times a second: a KVM that says nothing more slowly would be asked for ever."""
    half = [step] * (IN_A_ROW // 2)
    vcpu = scripted.create_vcpu(0, [*half, ScriptStep(errno=4), *half, hlt()])
    with pytest.raises(kvmexit.Error, match="ENOMEM|memory|in a row"):
        vcpu.run()
    assert isinstance(vcpu.run(), kvmexit.Hlt)


def test_after_a_lasting_enomem_the_vcpu_can_run_again(scripted):
    """ENOMEM for too long: the vCPU itself is intact."""
    vcpu = scripted.create_vcpu(0, [*[ScriptStep(errno=ENOMEM)] * IN_A_ROW, hlt()])
    with pytest.raises(kvmexit.KvmError):
        vcpu.run()
    assert isinstance(vcpu.run(), kvmexit.Hlt)


# ---- -1 and any other errno ----


@fatal
@stale
def test_any_other_errno_is_an_error(scripted, number, reason):
    """EINVAL, EIO, ENOEXEC and the rest, whatever exit_reason says: KvmError with the kernel's errno."""
    with pytest.raises(kvmexit.KvmError) as caught:
        scripted.create_vcpu(0, [ScriptStep(reason, FAULT, errno=number)]).run()
    assert (caught.value.errno, caught.value.call) == (number, "KVM_RUN")


@pytest.mark.parametrize(("number", "hint"), [(22, "register"), (5, "new one"), (12, "memory"), (8, "initialised")],
                         ids=["EINVAL", "EIO", "ENOMEM", "ENOEXEC"])
def test_an_error_names_the_next_step(scripted, number, hint):
    """EINVAL, EIO, ENOMEM, ENOEXEC: the message says what to look at."""
    with pytest.raises(kvmexit.KvmError, match=rf"^KVM_RUN: .*errno {number}.*{hint}"):
        scripted.create_vcpu(0, [ScriptStep(errno=number)], repeat=IN_A_ROW).run()


@fatal
def test_after_an_error_the_vcpu_can_run_again(scripted, number):
    """A failed entry leaves no trace: the next run() is an ordinary one."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(errno=number), hlt()])
    with pytest.raises(kvmexit.KvmError):
        vcpu.run()
    assert isinstance(vcpu.run(), kvmexit.Hlt)


def test_the_end_of_a_script_is_an_error(scripted):
    """ENODATA is a script's own errno: nothing is left to give out."""
    with pytest.raises(kvmexit.KvmError) as caught:
        scripted.create_vcpu(0, []).run()
    assert caught.value.errno == 61


# ---- what a failed entry leaves behind ----

FAILURES = {
    "EINVAL": [ScriptStep(errno=EINVAL)],
    "EINVAL with a stale reason": [ScriptStep(MEMORY_FAULT, FAULT, errno=EINVAL)],
    "lasting ENOMEM": [ScriptStep(errno=ENOMEM)] * IN_A_ROW,
    "no reason": [UNWRITTEN] * IN_A_ROW,
}
failures = pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)


@failures
def test_a_failed_entry_leaves_the_exit_pending(scripted, failure):
    """The exit that KVM should have completed is still vcpu.pending."""
    vcpu = scripted.create_vcpu(0, [pio_out(1, b"x"), *failure])
    io = vcpu.run()
    with pytest.raises(kvmexit.Error):
        vcpu.run()
    assert vcpu.pending is io


@failures
def test_a_failed_entry_keeps_the_answer(scripted, failure):
    """What a handler answered stays answered: it is not asked again."""
    asked = []
    scripted.on_pio(1, 1, lambda vcpu, io: asked.append(io) or 7)
    vcpu = scripted.create_vcpu(0, [pio_in(1), *failure, hlt()])
    with pytest.raises(kvmexit.Error):
        vcpu.run()
    exit = vcpu.run()
    assert (type(exit), len(asked)) == (kvmexit.Hlt, 1)


def test_a_failed_entry_leaves_the_answer_to_be_read(scripted):
    """vcpu.pending shows the answer that KVM has not taken yet."""
    scripted.on_pio(1, 1, lambda vcpu, io: 7)
    vcpu = scripted.create_vcpu(0, [pio_in(1), ScriptStep(errno=EINVAL)])
    with pytest.raises(kvmexit.KvmError):
        vcpu.run()
    assert vcpu.pending.data == b"\x07"


def test_a_failed_entry_leaves_the_answer_to_be_changed(scripted):
    """EINVAL may come of a bad answer: the exit takes a better one."""
    vcpu = scripted.create_vcpu(0, [pio_in(1), ScriptStep(errno=EINVAL)])
    io = vcpu.run()
    io.data = 7
    with pytest.raises(kvmexit.KvmError):
        vcpu.run()
    io.data = 8
    assert vcpu.pending.data == b"\x08"


def test_a_failed_entry_after_a_fault_leaves_nothing_pending(scripted):
    """A fault owes nothing and completes nothing, so there is nothing to keep."""
    vcpu = scripted.create_vcpu(0, [memory_fault(0x5000), ScriptStep(errno=EINVAL)])
    vcpu.run()
    with pytest.raises(kvmexit.KvmError):
        vcpu.run()
    assert vcpu.pending is None


@on_main_or_off
def test_what_an_interrupted_entry_completed_is_not_pending_after_a_failed_one(scripted, call):
    """EINTR comes after KVM has completed the exit: an EINVAL on the re-entry does not make it pending again."""
    vcpu = scripted.create_vcpu(0, [pio_in(1), ScriptStep(errno=EINTR), ScriptStep(errno=EINVAL)])
    io = vcpu.run()
    io.data = 7
    with pytest.raises(kvmexit.KvmError):
        call(vcpu.run)
    with pytest.raises(kvmexit.NotPendingError):
        io.data = 8
